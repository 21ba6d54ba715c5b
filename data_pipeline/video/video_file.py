"""A video file: number of frames, size, rate, and access to any frame.

Frame i is the i-th picture of a player. Raises DataError for a file that is not a video, for a truncated one
(unless allowed), and for a frame that can't be decoded.
"""

import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.video.forward import ForwardReader, readable
from flowmask.data_pipeline.video.packets import facts_of
from flowmask.data_pipeline.video.seeking import SeekingReader, seeking_reader
from flowmask.data_pipeline.video.times import ShowTimes, show_times
from flowmask.models.errors import DataError

_COST_OF_SEEKING = 4  # pictures decoded in the extra time of decord per picture: benchmarks/video.py


class VideoFile:
    """One open video; threads may share it. `size` is (height, width) in px of every frame, `len` their number."""

    def __init__(self, path: Path, *, allow_truncated: bool = False) -> None:
        """allow_truncated: a truncated file has its readable frames."""
        self.path, self._allow_truncated, self._lock = path, allow_truncated, threading.Lock()
        self._facts = facts_of(path)
        self.size, self.frames_per_second = self._facts.first.size, self._facts.rate
        self._forward = ForwardReader(path, self._facts.first)
        if self._facts.lost:
            _ = self._begins  # this refuses it

    def __len__(self) -> int:
        with self._lock:
            return len(self._begins)

    @cached_property
    def times(self) -> ShowTimes:
        """The display time of each picture."""
        with self._lock:
            begins: Sequence[int | None] = self._begins
        if self._facts.seekable:  # all are known, in the order of decoding
            begins = sorted(begin for begin in begins if begin is not None)
        last = max((time for time in begins if time is not None), default=None)
        lasts = next((duration for time, duration in reversed(self._facts.shown) if time == last), 0)
        facts, rate = self._facts, self.frames_per_second
        return show_times(begins, unit_s=facts.unit_s, last=lasts, rate=rate, jumps=facts.jumps)

    @cached_property
    def _begins(self) -> list[int | None]:
        """Begin of each picture: from the packets if each is a picture; otherwise only decoding shows it."""
        facts = self._facts
        if facts.seekable:
            return [begin for begin, _ in facts.shown]
        begins, damage = readable(self.path)
        begins = begins[: facts.whole]
        count = len(begins)
        if facts.lost and (facts.promised is None or count < facts.promised):
            damage = facts.lost
        if damage and not self._allow_truncated:
            promised = f"{facts.promised} frames" if facts.promised else "its frames"
            use = ", or set data.allow_truncated=true (predict: --allow-truncated) to use the readable frames"
            raise DataError(
                f"{self.path}: truncated or damaged: {count} of {promised} can be read ({damage}); replace the file"
                + use * bool(count)
            )
        if not count:
            raise DataError(f"{self.path}: no readable video, or a truncated one (no whole picture)")
        return begins

    def frames(self, ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        """rgb8 [H W 3] of each id, in the requested order; a repeated id is decoded once."""
        unique = sorted(set(ids))
        with self._lock:  # a reader has one position
            reader = (self._seeking if self._gains(unique) else None) or self._forward
            by_id = dict(zip(unique, reader.frames(unique), strict=True))
        return [by_id[i] for i in ids]

    @cached_property
    def _seeking(self) -> SeekingReader | None:
        return seeking_reader(self.path, self._facts)

    def _gains(self, ids: Sequence[int]) -> bool:
        """Whether seeking decodes fewer pictures: it starts at a keyframe, forward reading at the last position."""
        keys, sought, before = self._facts.keys, 0, 0
        if not self._facts.seekable:
            return False
        for i in ids:
            sought += _COST_OF_SEEKING + i + 1 - max(keys[bisect_right(keys, i) - 1], before)
            before = i + 1
        return sought < self._forward.distance(ids)
