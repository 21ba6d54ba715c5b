"""The sound of a video file for an mp4 with a part of the video: copied unchanged if an mp4 can hold it.

Other codecs become AAC, in mono or stereo. Cut at packets: a packet that begins within the pictures is kept whole.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from flowmask.data_pipeline.video.opening import opened, reason
from flowmask.data_pipeline.video.times import JUMP_S, RESTART_S, ShowTimes

_IN_MP4 = ("aac", "mp3", "mp2", "ac3", "eac3", "opus", "flac", "alac")  # the allowed ones that players know
_SLOWEST_MP3 = 16000  # Hz; mp4 does not allow slower ones
_RATES = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)  # Hz, of AAC

_WARM_UP = 2  # packets: a decoder needs the one before the first audible one


@dataclass(frozen=True)
class Soundtrack:
    """The sound of a file, from `start_s` on its clock, the display time of its first picture.

    shifts_s: time that is added to the clock after each of its starts, as in the pictures' times
    """

    path: Path
    start_s: Fraction
    shifts_s: tuple[Fraction, ...]


def soundtrack_of(path: Path, times: ShowTimes) -> Soundtrack | None:
    """The sound of a video file; None if there is none, it can't be decoded, or there are no times."""
    if times.start_s is None:
        return None
    with opened(path) as container:
        return Soundtrack(path, times.start_s, times.shifts_s) if _best(container) else None


class SoundCopy:
    """The sound for one mp4, written piece by piece between its pictures.

    problem: why a part is missing; "" if none is
    """

    def __init__(self, sound: Soundtrack, mp4: OutputContainer) -> None:
        """mp4: with its header not yet written."""
        self._source, self._mp4, self.problem = opened(sound.path), mp4, ""
        stream = _best(self._source)
        assert stream is not None
        self._stream, self._sound = stream, sound
        codec = stream.codec_context.codec.canonical_name
        if codec in _IN_MP4 and (codec != "mp3" or stream.rate >= _SLOWEST_MP3):
            self._out = mp4.add_stream_from_template(stream)
            self._packets = self._stored()
        else:
            rate = next((rate for rate in _RATES if rate <= stream.rate), _RATES[-1])
            self._out = mp4.add_stream("aac", rate=rate, layout="mono" if stream.channels == 1 else "stereo")
            self._packets = self._encoded()
        self._next = next(self._packets, None)

    def write_until(self, end_s: Fraction) -> None:
        """Mux all packets that begin before `end_s` s of the mp4."""
        while self._next is not None and _begin_s(self._next, Fraction(0)) < end_s:
            self._next.stream = self._out
            self._mp4.mux(self._next)
            self._next = next(self._packets, None)

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def _stored(self) -> Iterator[Packet]:
        """The packets of the file from the start time on, with the mp4's times, which rise."""
        packets, shifts = self._source.demux(self._stream), list(self._sound.shifts_s)
        clock, latest = -math.inf, -math.inf  # of the packet before, in its time base: in the file, and in the mp4
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError as error:
                self.problem = reason(error)
                return
            if packet.pts is None or not packet.size:
                continue
            since_s = (packet.pts - clock) * packet.time_base
            if len(shifts) > 1 and not -RESTART_S <= since_s <= JUMP_S and clock > -math.inf:
                del shifts[0]
            clock = packet.pts
            packet.pts += round((shifts[0] - self._sound.start_s) / packet.time_base)
            packet.dts = packet.pts
            if packet.pts > latest and packet.pts + _WARM_UP * (packet.duration or 0) >= 0:
                latest = packet.pts
                yield packet

    def _encoded(self) -> Iterator[Packet]:
        ahead_s = Fraction(0)  # begin of the next samples, if they do not say it
        for packet in chain(self._stored(), [None]):
            try:
                frames = self._stream.decode(packet)
            except av.FFmpegError as error:  # players continue after it
                self.problem = reason(error)
                continue
            for frame in frames:
                rate = frame.sample_rate
                begin_s = _begin_s(frame, ahead_s)
                frame.pts, frame.time_base = round(begin_s * rate), Fraction(1, rate)
                ahead_s = begin_s + Fraction(frame.samples, rate)
                yield from self._out.encode(frame)
        yield from self._out.encode(None)


def _begin_s(piece: Packet | AudioFrame, otherwise: Fraction) -> Fraction:
    """Begin of a packet or a decoded frame, if it has one."""
    return otherwise if piece.pts is None or piece.time_base is None else piece.pts * piece.time_base


def _best(container: InputContainer) -> AudioStream | None:
    found = container.streams.best("audio")
    return found if isinstance(found, AudioStream) and found.codec_context is not None else None
