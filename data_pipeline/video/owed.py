"""The packets of a video that must give a picture: decoders and demuxers silently drop some, or show one twice.

The times show it: in containers that write times, a packet and its picture have the same time.
"""

import re
from collections import Counter
from collections.abc import Sequence

import av
from av.container import InputContainer
from av.packet import Packet

_COUNTED = ("mov", "avi")  # containers with an index of all frames; their first frame is a real beginning
_REORDERED = 16  # pictures that one may overtake: the most of any codec
# Bytes of the first packet of a real beginning, for containers that may wrongly call it a keyframe.
_BEGINNINGS = {
    ("avi", "h264"): re.compile(rb"\x00\x00\x01[\x05\x25\x45\x65\x85\xa5\xc5\xe5]"),  # later packets are shown later
    ("mov", "mpeg2video"): re.compile(rb"\x00\x00\x01\xb3"),
}
_NOT_CODED = 16  # bytes; a smaller MPEG-4 packet may repeat the last picture


class Owed:
    """Sees the packets of one stream as they go to the decoder; `lost` compares them with the decoded pictures."""

    def __init__(self, container: InputContainer, stream: av.VideoStream) -> None:
        self._container = container.format.name.partition(",")[0]
        self._stream, self._codec = stream, stream.codec_context.codec.canonical_name
        self._first: int | None = None  # display time of the first keyframe: earlier packets may need others
        self._strict = self._container in _COUNTED  # each packet from the keyframe on gives a picture
        self._times: set[int] = set()
        self._packets: Counter[int] = Counter()  # number of packets per display time
        self._discarded: list[tuple[int, int]] = []  # display and decoding time
        self._waits: list[int] = []  # from decoding to display: the shortest and the longest

    @property
    def times_are_written(self) -> bool:
        """Whether the file has display times; if FFmpeg counts them, a picture may get the time of a lost one."""
        return self._container != "avi"

    @property
    def begun(self) -> bool:
        """Whether the first keyframe of the video has come, so that an error is damage."""
        return self._strict and self._first is not None

    def see(self, packet: Packet) -> None:
        """Takes the next packet, before it is decoded."""
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
            if packet.is_keyframe and beginning is not None:  # else damage hides the index's keyframe
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
        """Display times of pictures that are missing or too many, sorted; shown: the times of all pictures."""
        times = [time for time in shown if time is not None]
        if not times or not self._times:
            return []
        in_order = sorted(times)
        twice = {time for time, pictures in Counter(times).items() if pictures > max(1, self._packets[time])}
        if self._container == "mov" and times != in_order and self._discards_before(in_order[-_REORDERED:][0]):
            return sorted(self._times)  # an edit list with wrong times
        missing = self._times.difference(times)
        if not self._strict:  # recordings begin anywhere; their first pictures may need earlier ones
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
        """Whether a packet correctly gives no picture: a frame only for reference, or one that repeats the last."""
        if self._codec == "vp8":
            return not bytes(packet)[0] & 0x10
        if self._codec == "vp9" and self._container != "mov":  # the last byte says that the packet has more frames
            return not bytes(packet)[0] & 0x0A and bytes(packet)[-1] & 0xE0 != 0xC0
        return self._codec == "mpeg4" and packet.size <= _NOT_CODED
