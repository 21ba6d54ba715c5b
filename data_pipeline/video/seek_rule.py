"""Which files decord may seek in: those whose packets show that each of its seeks finds the picture asked for.

decord counts packets, and seeks to the keyframe that stands at a packet's place. Both are right only if every packet
is one shown picture, and every keyframe a clean cut: all that stands before it in the file is shown before it, all
that stands behind it is shown later and needs nothing from before. Everything else is read forward, by PyAV.
"""

import av
from av.packet import Packet

_SLICE, _IDR, _PARTITIONS, _PARAMETERS = 1, 5, (2, 3, 4), 7
_MP4, _MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"


class SeekRule:
    """Sees all packets of one stream in the order of the file; `keys` are the places of its keyframes."""

    def __init__(self, stream: av.VideoStream) -> None:
        context = stream.codec_context
        self._extra = bytes(context.extradata or b"")
        # avcC: NAL units stand behind their lengths. Others (start codes) come from raw streams.
        self._broken = context.name != "h264" or len(self._extra) < 7 or self._extra[0] != 1
        self._length_bytes = 0 if self._broken else (self._extra[4] & 3) + 1
        self._times: list[int] = []
        self._key_times: list[tuple[int, int]] = []  # of decoding and showing
        self._position = -1
        self.keys: list[int] = []

    def see(self, packet: Packet) -> None:
        """The next packet; after the first that breaks the rule nothing more is looked at."""
        if self._broken:
            return
        position = packet.pos if packet.pos is not None else -1
        if (
            packet.pts is None
            or packet.is_discard
            or packet.is_corrupt
            or position <= self._position  # a part that an edit list repeats
            or packet.has_sidedata("new_extradata")
            or not self._one_picture(bytes(packet), key=packet.is_keyframe)
        ):
            self._broken = True
            return
        self._position = position
        if packet.is_keyframe:
            self.keys.append(len(self._times))
            self._key_times.append((packet.pts if packet.dts is None else packet.dts, packet.pts))
        self._times.append(packet.pts)

    def holds(self, container: str) -> bool:
        """Whether all packets seen keep the rule, in a container whose index decord reads."""
        if self._broken or container not in (_MP4, _MATROSKA) or not self.keys or self.keys[0]:
            return False
        if len(set(self._times)) < len(self._times):
            return False
        ends = [*self.keys[1:], len(self._times)]
        latest = None
        for start, end, (_, shown) in zip(self.keys, ends, self._key_times):
            group = self._times[start:end]
            if min(group) != shown or (latest is not None and latest > shown):
                return False
            latest = max(group)
        # mp4 is searched by decoding times: the time when a keyframe is shown must lie before the next one's.
        following = self._key_times[1:]
        return container == _MATROSKA or all(
            shown < decoded for (_, shown), (decoded, _) in zip(self._key_times, following)
        )

    def _one_picture(self, data: bytes, *, key: bool) -> bool:
        """Whether the packet is whole NAL units, among them the slices of one picture, of an IDR if it is a key."""
        at, pictures, wanted = 0, 0, _IDR if key else _SLICE
        while at < len(data):
            start = at + self._length_bytes
            at = start + int.from_bytes(data[at:start])
            if at > len(data) or at <= start or data[start] & 0x80:
                return False
            kind = data[start] & 31
            if kind in (_SLICE, _IDR):
                if kind != wanted or at < start + 2:
                    return False
                pictures += data[start + 1] >> 7  # set: its first macroblock is the picture's first
            elif kind in _PARTITIONS or (kind == _PARAMETERS and data[start:at] not in self._extra):
                return False
        return pictures == 1
