"""Reads any video by decoding it forward from the first picture: correct for every file that FFmpeg decodes.

Seeking is correct only if keyframes are clean cuts and times are true, so it is not used. The position after the last
call is kept: requests in order need only one pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from flowmask.data_pipeline.video.opening import opened, reason, video_stream
from flowmask.data_pipeline.video.owed import Owed
from flowmask.data_pipeline.video.picture import Picture, rgb_of
from flowmask.models.errors import DataError


class _DamagedError(Exception):
    """Raised after the last picture before damage; the message is FFmpeg's reason."""


class ForwardReader:
    """Pictures of one file by their number. Not thread safe."""

    def __init__(self, path: Path, first: Picture) -> None:
        self._path, self._first = path, first
        self._reformatter = VideoReformatter()
        self._pictures: Iterator[av.VideoFrame] = iter(())
        self._next = -1  # number of the next picture; -1: not begun

    def frames(self, ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        """rgb8 [H W 3] of each of the sorted, distinct ids."""
        if ids and not 0 <= self._next <= ids[0]:
            self._pictures, self._next = _pictures(self._path), 0
        return [self._frame(number) for number in ids]

    def distance(self, ids: Sequence[int]) -> int:
        """Number of pictures that `frames` would decode."""
        if not ids:
            return 0
        return ids[-1] + 1 - (self._next if 0 <= self._next <= ids[0] else 0)

    def _frame(self, number: int) -> NDArray[np.uint8]:
        try:
            while self._next <= number:
                frame = next(self._pictures)
                self._next += 1
        except (StopIteration, _DamagedError) as end:
            read, self._next = self._next, -1
            said = f" ({end})" if str(end) else ""
            raise DataError(
                f"{self._path}: truncated or damaged: frame {number} was requested, but only {read} decode{said}"
            ) from None
        if (frame.height, frame.width) != self._first.stored:
            raise DataError(
                f"{self._path}: frame {number} has {frame.height}x{frame.width} px (height x width), the first one "
                f"{self._first.stored[0]}x{self._first.stored[1]}: encode the video again in one size"
            )
        return rgb_of(frame, self._first, reformatter=self._reformatter)


def readable(path: Path) -> tuple[list[int | None], str]:
    """Times of the pictures before the first lost one, in the order of display, by decoding all.

    Also the reason of the loss, "" if none is lost.
    """
    shown: list[int | None] = []
    sound, first_corrupt, fields, damage = 0, None, False, ""
    with opened(path) as container:
        stream = video_stream(container, path=path)
        owed = Owed(container, stream)
        try:
            for frame in _decoded(container, stream, owed):
                shown.append(frame.pts)
                fields |= frame.interlaced_frame  # each packet may be a field; two fields make a picture
                if not frame.is_corrupt:
                    sound = len(shown)
                elif first_corrupt is None:
                    first_corrupt = len(shown) - 1
            damage = "" if sound == len(shown) else "its last picture is incomplete"
        except _DamagedError as error:
            damage = str(error)
    lost = [] if fields else owed.lost(shown)
    if lost:
        sound = min(sound, sum(1 for _ in takewhile(lambda time: time is None or time < lost[0], shown)))
        if not owed.times_are_written and first_corrupt is not None:
            sound = min(sound, first_corrupt)
        damage = damage or f"{len(lost)} of its pictures do not decode"
    times = shown[:sound]
    if not owed.times_are_written:  # each picture has that of the packet which was decoded when it was shown
        known = sorted(time for time in times if time is not None)
        times = [*known] if len(known) == len(times) else [None] * len(times)
    return times, damage


def _pictures(path: Path) -> Iterator[av.VideoFrame]:
    """Every picture in order; raises _DamagedError after the pictures before damage."""
    with opened(path) as container:
        stream = video_stream(container, path=path)
        yield from _decoded(container, stream, Owed(container, stream))


def _decoded(container: InputContainer, stream: av.VideoStream, owed: Owed) -> Iterator[av.VideoFrame]:
    """Every picture of the stream in order; raises _DamagedError after the pictures before damage.

    Packets before the first decodable keyframe are skipped, as players do: broadcasts may begin anywhere.
    """
    begun, damage = False, ""
    failure = av.FFmpegError  # a local: Python may empty this module before it closes an open reader
    try:
        for packet in container.demux(stream):
            owed.see(packet)
            try:
                frames = packet.decode()
            except failure as error:
                if begun or owed.begun:
                    damage = reason(error)
                    break
                continue
            begun = begun or packet.is_keyframe
            yield from frames
    except failure as error:
        damage = reason(error)
    if damage:
        with suppress(failure):
            yield from stream.decode(None)  # pictures before the damage that are still in the decoder
        raise _DamagedError(damage)
