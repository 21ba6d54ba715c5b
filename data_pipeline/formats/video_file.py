"""Video files, read with decord: how many frames, of which size, and any of them.

Refused by DataError: a file that is missing, is no video, or is cut or damaged (where decord raises, or
gives fewer frames than its own count).
"""

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.models.errors import DataError


class VideoFile:
    """One open video. `size` is (height, width) in px of every frame, `len` the number of frames."""

    def __init__(self, path: Path):
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # FFmpeg would write its own lines beside ours
        if not path.is_file():
            raise DataError(f"{path}: no such video file")
        self.path, self._lock = path, threading.Lock()  # a reader has one position
        try:
            self._reader: Any = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
            self._length = len(self._reader)
            self.size: tuple[int, int] = self._reader[0].shape[:2]
        except (RuntimeError, IndexError, decord.DECORDError) as error:
            raise DataError(f"{path}: no readable video, or a truncated one ({_reason(error)})") from error

    def __len__(self) -> int:
        return self._length

    @property
    def frames_per_second(self) -> float:
        return float(self._reader.get_avg_fps())

    def frames(self, ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        """rgb8 [H W 3] of each id, in the order asked for; a frame asked for twice is decoded once."""
        import decord

        unique = sorted(set(ids))
        try:
            with self._lock:
                decoded = self._reader.get_batch(unique).asnumpy()
        except (RuntimeError, IndexError, decord.DECORDError) as error:
            raise DataError(
                f"{self.path}: truncated or damaged: a frame cannot be decoded ({_reason(error)})"
            ) from error
        if len(decoded) != len(unique):
            raise DataError(f"{self.path}: truncated: {len(decoded)} of the {len(unique)} frames asked for decode")
        by_id = dict(zip(unique, decoded, strict=True))
        return [by_id[i] for i in ids]


def _reason(error: Exception) -> str:
    """The end of what decord says, without the time, addresses and stack that its messages carry."""
    said = str(error).partition("Stack trace")[0]
    said = re.sub(r"\[\d\d:\d\d:\d\d\]\s*|\b0x[0-9a-fA-F]+\b", "", said)
    return " ".join(said.split())[-160:]
