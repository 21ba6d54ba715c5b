"""The files in which decord may seek: their packets show that each seek finds the right picture.

decord counts packets, and seeks to the keyframe at a packet's index. Both are right only if every packet is one shown
picture and every keyframe is a clean cut: all packets before it in the file are shown before it, and all packets
after it are shown later and need nothing from before. PyAV reads all other files forward.
"""

import av
from av.packet import Packet

_SLICE, _IDR, _PARTITIONS, _PARAMETERS = 1, 5, (2, 3, 4), 7
_MP4, _MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"


class SeekRule:
    """Sees all packets of one stream in the order of the file; `keys` are the indices of its keyframes."""

    def __init__(self, stream: av.VideoStream) -> None:
        context = stream.codec_context
        self._extra = bytes(context.extradata or b"")
        # avcC: each NAL unit follows its length. Others (start codes) come from raw streams.
        self._broken = context.name != "h264" or len(self._extra) < 7 or self._extra[0] != 1
        self._length_bytes = 0 if self._broken else (self._extra[4] & 3) + 1
        self._times: list[int] = []
        self._key_times: list[tuple[int, int]] = []  # of decoding and display
        self._position = -1
        self.keys: list[int] = []

    def see(self, packet: Packet) -> None:
        """Takes the next packet; nothing is checked after the first one that breaks the rule."""
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
        """Whether all packets obey the rule, in a container whose index decord reads."""
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
        # mp4 is searched by decoding times: a keyframe's display time must be before the next one's decoding time.
        following = self._key_times[1:]
        return container == _MATROSKA or all(
            shown < decoded for (_, shown), (decoded, _) in zip(self._key_times, following)
        )

    def _one_picture(self, data: bytes, *, key: bool) -> bool:
        """Whether the packet has only whole NAL units, with the slices of one picture (of an IDR if it is a key)."""
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
                pictures += data[start + 1] >> 7  # set: this slice has the picture's first macroblock
            elif kind in _PARTITIONS or (kind == _PARAMETERS and data[start:at] not in self._extra):
                return False
        return pictures == 1
