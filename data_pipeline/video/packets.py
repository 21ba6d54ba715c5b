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
from flowmask.models.errors import DataError

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


def facts_of(path: Path) -> Facts:
    """Demux the whole file; DataError if it holds no picture."""
    with opened(path) as container:
        stream = video_stream(container, path=path)
        seen = _Seen(stream, path)
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
        rate, ends_s = _rate(seen.shown, stream), _stated_end_s(container)
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
        return Facts(seen.first, count, whole, rate, keys, promised, lost, seekable, seen.shown, stream.time_base)


class _Seen:
    """Facts gathered while the packets pass."""

    def __init__(self, stream: av.VideoStream, path: Path) -> None:
        self.first: Picture | None = None
        self.refused = ""  # FFmpeg's reason why the first picture can't be decoded
        self.shown: list[tuple[int | None, int]] = []  # time and duration, in the stream's time base
        self.places: list[int] = []  # byte positions of the shown packets
        self.sizes: dict[int, int] = {}  # bytes by position, for packets of all streams
        self.discarded = 0
        self.overtaken: set[int] = set()  # positions of packets discarded because their time has passed
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
        self._decoded = self._decoded if packet.dts is None else packet.dts
        self.shown.append((packet.pts, packet.duration or 0))
        self.places.append(-1 if packet.pos is None else packet.pos)
        if packet.pts is not None and packet.time_base:
            self.start_s = min(self.start_s, float(packet.pts * packet.time_base))

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


def _rate(shown: Sequence[tuple[int | None, int]], stream: av.VideoStream) -> float:
    """Pictures per second, so that all of them together last as long as in a player.

    The header's average is used if it explains the times within half a picture: they may be rounded.
    """
    average = stream.average_rate or stream.guessed_rate or Fraction(25)
    timed = [(pts, pts + duration) for pts, duration in shown if pts is not None]
    if len(timed) < len(shown) or not stream.time_base or not timed:
        return float(average)
    start = min(begin for begin, _ in timed)
    last, end = max(timed)
    if end == last:
        end += round(1 / (average * stream.time_base))
    span_s = float((end - start) * stream.time_base)
    if span_s <= 0 or abs(span_s - len(timed) / float(average)) <= 0.5 / float(average):
        return float(average)
    return len(timed) / span_s
