"""Which packets of a video must give a picture: decoders and demuxers drop some without an error.

Their times tell: a packet and its picture have the same one, in containers that write times.
"""

from collections.abc import Sequence

import av
from av.container import InputContainer
from av.packet import Packet

_COUNTED = ("mov", "avi")  # containers with an index of all frames, the first of which is no accident
_REORDERED = 16  # pictures that one may overtake: the most of any codec
_NOT_CODED = 16  # bytes of an MPEG-4 packet that may say: the picture before stays


class Owed:
    """Sees the packets of one stream as the decoder is given them; `lost` compares with what it gave."""

    def __init__(self, container: InputContainer, stream: av.VideoStream) -> None:
        name = container.format.name.partition(",")[0]
        self.counted, self._mov = name in _COUNTED, name == "mov"
        self._codec = stream.codec_context.codec.canonical_name
        self._keys = {entry.timestamp for entry in stream.index_entries if entry.is_keyframe} if self.counted else set()
        self._first: int | None = None  # when the first keyframe is shown: those before it may need others
        self._times: set[int] = set()
        self._discarded: list[tuple[int, int]] = []  # when shown and when decoded
        self._waits: list[int] = []  # from decoding to showing: the shortest and the longest

    def key(self, packet: Packet) -> bool:
        """Whether it is a keyframe by itself, or by the index: damage may hide it from FFmpeg."""
        return packet.is_keyframe or packet.dts in self._keys

    def see(self, packet: Packet) -> None:
        """The next packet, from the first keyframe on."""
        if packet.pts is None or not packet.size:
            return
        shown, decoded = packet.pts, packet.pts if packet.dts is None else packet.dts
        self._first = shown if self._first is None else self._first
        if packet.is_discard:
            self._discarded.append((shown, decoded))
            return
        slack = _REORDERED * (packet.duration or 0)
        waits = [*self._waits, shown - decoded - slack, shown - decoded + slack]
        self._waits = [min(waits), max(waits)]
        if shown >= self._first and not self._hidden(packet):
            self._times.add(shown)

    def lost(self, shown: Sequence[int | None]) -> list[int]:
        """When the pictures that are missing would be shown, in order, given the times of those that are there."""
        times = [time for time in shown if time is not None]
        if not times or not self._times:
            return []
        in_order = sorted(times)
        if self._mov and times != in_order and self._discards_before(in_order[-_REORDERED:][0]):
            return sorted(self._times)  # an edit list, of times that are not true
        missing = self._times.difference(times)
        if not self.counted:  # recordings begin and end anywhere
            missing = {time for time in missing if times[0] < time < times[-1]}
        shortest, longest = self._waits
        strays = {decoded for time, decoded in self._discarded if not shortest <= time - decoded <= longest}
        return sorted(missing | strays)

    def _discards_before(self, time: int) -> bool:
        return any(decoded < time for _, decoded in self._discarded)

    def _hidden(self, packet: Packet) -> bool:
        """Whether a packet rightly gives no picture: a frame for reference alone, or one that repeats the last."""
        if self._codec == "vp8":
            return not bytes(packet)[0] & 0x10
        if self._codec == "vp9" and not self._mov:  # the last byte tells that more frames follow in the packet
            return not bytes(packet)[0] & 0x0A and bytes(packet)[-1] & 0xE0 != 0xC0
        return self._codec == "mpeg4" and packet.size <= _NOT_CODED
