"""Which packets of a video must give a picture: decoders and demuxers drop some without an error, or show one twice.

Their times tell: a packet and its picture have the same one, in containers that write times.
"""

import re
from collections import Counter
from collections.abc import Sequence

import av
from av.container import InputContainer
from av.packet import Packet

_COUNTED = ("mov", "avi")  # containers with an index of all frames, the first of which is no accident
_REORDERED = 16  # pictures that one may overtake: the most of any codec
# What the first packet holds if the video begins there, where a container may falsely say so of a keyframe.
_BEGINNINGS = {
    ("avi", "h264"): re.compile(rb"\x00\x00\x01[\x05\x25\x45\x65\x85\xa5\xc5\xe5]"),  # all behind it is shown later
    ("mov", "mpeg2video"): re.compile(rb"\x00\x00\x01\xb3"),
}
_NOT_CODED = 16  # bytes of an MPEG-4 packet that may say: the picture before stays


class Owed:
    """Sees the packets of one stream as the decoder is given them; `lost` compares with what it gave."""

    def __init__(self, container: InputContainer, stream: av.VideoStream) -> None:
        self._container = container.format.name.partition(",")[0]
        self._stream, self._codec = stream, stream.codec_context.codec.canonical_name
        self._first: int | None = None  # when the first keyframe is shown: those before it may need others
        self._strict = self._container in _COUNTED  # each packet from there on gives a picture
        self._times: set[int] = set()
        self._packets: Counter[int] = Counter()  # how many are shown at each time
        self._discarded: list[tuple[int, int]] = []  # when shown and when decoded
        self._waits: list[int] = []  # from decoding to showing: the shortest and the longest

    @property
    def times_are_written(self) -> bool:
        """Whether the file says when pictures are shown; where FFmpeg counts, one may take the time of a lost one."""
        return self._container != "avi"

    @property
    def begun(self) -> bool:
        """Whether the keyframe that the video begins with has come, so that an error is damage."""
        return self._strict and self._first is not None

    def see(self, packet: Packet) -> None:
        """The next packet, before it is decoded."""
        if packet.pts is None or not packet.size:
            return
        shown, decoded = packet.pts, packet.pts if packet.dts is None else packet.dts
        self._packets[shown] += 1
        if self._first is None and not self._key(packet):
            self._strict = False
            return
        if self._first is None:
            self._first = shown
            beginning = _BEGINNINGS.get((self._container, self._codec))
            if packet.is_keyframe and beginning is not None:  # else damage hides what the index calls a keyframe
                self._strict = self._strict and bool(beginning.search(bytes(packet)))
        if packet.is_discard:
            self._discarded.append((shown, decoded))
            return
        slack = _REORDERED * (packet.duration or 0)
        waits = [*self._waits, shown - decoded - slack, shown - decoded + slack]
        self._waits = [min(waits), max(waits)]
        if shown >= self._first and not self._hidden(packet):
            self._times.add(shown)

    def lost(self, shown: Sequence[int | None]) -> list[int]:
        """When pictures are shown that are missing, or there once too often, in order; shown: the times of all."""
        times = [time for time in shown if time is not None]
        if not times or not self._times:
            return []
        in_order = sorted(times)
        twice = {time for time, pictures in Counter(times).items() if pictures > max(1, self._packets[time])}
        if self._container == "mov" and times != in_order and self._discards_before(in_order[-_REORDERED:][0]):
            return sorted(self._times)  # an edit list, of times that are not true
        missing = self._times.difference(times)
        if not self._strict:  # recordings begin anywhere, with pictures that need some before them
            missing = {time for time in missing if time > in_order[:2][-1]}
        if self._container not in _COUNTED:  # and end anywhere
            missing = {time for time in missing if time < times[-1]}
        shortest, longest = self._waits
        strays = {decoded for time, decoded in self._discarded if not shortest <= time - decoded <= longest}
        return sorted(missing | strays | twice)

    def _key(self, packet: Packet) -> bool:
        """Whether it is a keyframe by itself, or by the index: damage may hide it from FFmpeg."""
        return packet.is_keyframe or (
            self._container in _COUNTED
            and any(entry.is_keyframe and entry.timestamp == packet.dts for entry in self._stream.index_entries)
        )

    def _discards_before(self, time: int) -> bool:
        return any(decoded < time for _, decoded in self._discarded)

    def _hidden(self, packet: Packet) -> bool:
        """Whether a packet rightly gives no picture: a frame for reference alone, or one that repeats the last."""
        if self._codec == "vp8":
            return not bytes(packet)[0] & 0x10
        if (
            self._codec == "vp9" and self._container != "mov"
        ):  # the last byte tells that more frames follow in the packet
            return not bytes(packet)[0] & 0x0A and bytes(packet)[-1] & 0xE0 != 0xC0
        return self._codec == "mpeg4" and packet.size <= _NOT_CODED
