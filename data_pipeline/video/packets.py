"""One pass over the packets of a video file; only the first picture is decoded.

Reports the form of the file, the length it promises, and whether decord may seek in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet

from flowmask.data_pipeline.video.opening import opened, reason, video_stream
from flowmask.data_pipeline.video.picture import Picture, picture_of
from flowmask.data_pipeline.video.promise import damage_of_avi, first_unplaced, missing_bytes
from flowmask.data_pipeline.video.seek_rule import SeekRule
from flowmask.data_pipeline.video.times import JUMP_S, RESTART_S
from flowmask.models.errors import DataError

_CLOCK_MAY_JUMP = 0x200  # FFmpeg's AVFMT_TS_DISCONT
_GAP_S = 0.25  # smaller gaps before the promised end prove nothing


@dataclass(frozen=True)
class Facts:
    """Facts from the packets of one video file.

    count:    packets that are not discarded: if `seekable`, the pictures
    rate:     pictures per second
    keys:     indices of the keyframes among the packets
    promised: number of pictures by the header of a file that lost some; None if it has no number
    whole:    pictures before the first damaged fragment; None if no fragment is damaged
    lost:     why its end seems to be missing, in a few words; "" if nothing says so
    seekable: every seek to one of its pictures is correct
    shown:    display time and duration of each counted packet, in units of `unit_s` s
    jumps:    whether its format is for recordings, whose clock may jump
    """

    first: Picture
    count: int
    whole: int | None
    rate: float
    keys: tuple[int, ...]
    promised: int | None
    lost: str
    seekable: bool
    shown: Sequence[tuple[int | None, int]]
    unit_s: Fraction | None
    jumps: bool


def facts_of(path: Path) -> Facts:
    """Demux the whole file; DataError if it holds no picture."""
    with opened(path) as container:
        stream = video_stream(container, path=path)
        seen = _Seen(stream, path, jumps=bool(container.format.flags & _CLOCK_MAY_JUMP))
        lost = ""
        try:
            for packet in container.demux():
                seen.add(packet)
        except av.FFmpegError as error:
            lost = reason(error)
        if seen.first is None:
            raise DataError(f"{path}: no readable video, or a truncated one ({seen.refused or lost or 'no picture'})")
        if container.format.name == "avi" and (why := damage_of_avi(path)):
            raise DataError(f"{path}: damaged: {why}")
        if seen.incomplete and container.format.name != "mpegts":  # mpegts recordings end anywhere
            lost = "its last packet is incomplete"
        if behind := missing_bytes(path):
            lost = f"{behind:,} bytes are missing at its end"
        rate, ends_s = _rate(seen.parts(), stream), _stated_end_s(container)
        if not lost and ends_s - seen.end_s > _GAP_S:
            lost = f"its packets end {ends_s - seen.end_s:.2f} s before the duration in its header"
        unplaced, promised, whole = seen.first_unplaced(container), None, None
        if container.format.name.startswith("mov") or container.format.name == "avi":
            held = max(len(stream.index_entries), stream.frames if lost else 0) - seen.discarded
            if held > len(seen.shown) and not lost and unplaced is None:
                raise DataError(
                    f"{path}: damaged: {held - len(seen.shown)} of {held} frames can't be found in the file"
                )
            if held > len(seen.shown):
                promised = held
            elif lost and stream.frames and unplaced is None and not seen.incomplete:
                lost = ""  # all pictures are there: only an index or sound is missing
        elif lost and ends_s > seen.end_s > seen.start_s:
            promised = round((ends_s - seen.start_s) * float(stream.average_rate or rate))
        if unplaced is not None:
            lost = lost or f"a fragment at byte {unplaced:,} is damaged"
            whole = sum(place < unplaced for place in seen.places)
        alone = len(container.streams.video) == 1
        seekable = not lost and alone and seen.first.plain and seen.rule.holds(container.format.name)
        keys, count = tuple(seen.rule.keys), len(seen.shown)
        unit_s, shown = stream.time_base, seen.shown
        return Facts(seen.first, count, whole, rate, keys, promised, lost, seekable, shown, unit_s, seen.jumps)


class _Seen:
    """Facts gathered while the packets pass."""

    def __init__(self, stream: av.VideoStream, path: Path, *, jumps: bool) -> None:
        self.first: Picture | None = None
        self.refused = ""  # FFmpeg's reason why the first picture can't be decoded
        self.shown: list[tuple[int | None, int]] = []  # time and duration, in the stream's time base
        self.places: list[int] = []  # byte positions of the shown packets
        self.sizes: dict[int, int] = {}  # bytes by position, for packets of all streams
        self.discarded = 0
        self.overtaken: set[int] = set()  # positions of packets discarded because their time has passed
        self.restarts: list[int] = []  # shown packets at which the clock begins anew: recordings joined to one file
        self.jumps = jumps
        self._decoded = -math.inf  # decoding time of the last packet
        self.incomplete = False  # whether the last packet is
        self.start_s = math.inf  # of the first picture
        self.end_s = 0.0  # latest end of a packet of any stream
        self.rule = SeekRule(stream)
        self._stream, self._path = stream, path

    def add(self, packet: Packet) -> None:
        """Takes the next packet of any stream; an empty one flushes the decoder."""
        if packet.pts is not None and packet.time_base:
            self.end_s = max(self.end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.pos is not None:
            self.sizes[packet.pos] = packet.size
        if packet.stream_index != self._stream.index:
            return
        if self.first is None:
            self._decode(packet)
        if not packet.size:
            return
        self.rule.see(packet)
        self.incomplete = packet.is_corrupt
        if packet.is_discard:
            self.discarded += 1
            if packet.dts is not None and packet.dts < self._decoded and packet.pos is not None:
                self.overtaken.add(packet.pos)
            return
        if packet.dts is not None and packet.time_base:
            since_s = (packet.dts - self._decoded) * packet.time_base
            if self.shown and (since_s < -RESTART_S or (self.jumps and since_s > JUMP_S)):
                self.restarts.append(len(self.shown))
            self._decoded = packet.dts
        self.shown.append((self._time(packet), packet.duration or 0))
        self.places.append(-1 if packet.pos is None else packet.pos)
        if packet.pts is not None and packet.time_base:
            self.start_s = min(self.start_s, float(packet.pts * packet.time_base))

    def _time(self, packet: Packet) -> int | None:
        """Its display time; at the end of a recording FFmpeg may state one of the recording behind it."""
        if not self.jumps or packet.pts is None or packet.dts is None or packet.time_base is None:
            return packet.pts
        return packet.dts if abs(packet.pts - packet.dts) * packet.time_base > JUMP_S else packet.pts

    def parts(self) -> list[list[tuple[int | None, int]]]:
        """The shown packets, divided where the clock begins anew."""
        ends = [*self.restarts, len(self.shown)]
        return [self.shown[begin:end] for begin, end in zip([0, *self.restarts], ends)]

    def first_unplaced(self, container: InputContainer) -> int | None:
        """The first byte of frames that no fragment names."""
        if not container.format.name.startswith("mov"):
            return None
        all_known = all(stream.type in ("video", "audio") for stream in container.streams)
        return first_unplaced(self._path, self.sizes, overtaken=self.overtaken, all_known=all_known)

    def _decode(self, packet: Packet) -> None:
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            self.refused = reason(error)
            return
        if frames:
            assert isinstance(frames[0], av.VideoFrame)
            self.first = picture_of(frames[0], path=self._path)


def _stated_end_s(container: InputContainer) -> float:
    """The end of the last packet by the header, unless it is FFmpeg's estimate; 0 if the header has none."""
    stated = container.format.name.partition(",")[0] in ("matroska", "flv", "live_flv")
    return container.duration / av.time_base if stated and container.duration else 0.0


def _rate(parts: Sequence[Sequence[tuple[int | None, int]]], stream: av.VideoStream) -> float:
    """Pictures per second, so that all of them together last as long as in a player.

    The header's average is used if it explains the times within half a picture of each part: they may be rounded, and
    one of two pictures with the same time may be too many.
    """
    average, unit_s = stream.average_rate or stream.guessed_rate or Fraction(25), stream.time_base
    fewest, span_s = 0, 0.0
    for part in parts:
        ends = {pts: pts + duration for pts, duration in part if pts is not None}
        if not unit_s or not ends or any(pts is None for pts, _ in part):
            return float(average)
        last = max(ends)
        end = ends[last] if ends[last] > last else last + round(1 / (average * unit_s))
        fewest, span_s = fewest + len(ends), span_s + float((end - min(ends)) * unit_s)
    count, half = sum(map(len, parts)), 0.5 * len(parts)
    if span_s <= 0 or fewest - half <= span_s * float(average) <= count + half:
        return float(average)
    return count / span_s
