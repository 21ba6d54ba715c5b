"""Reads videos by decord, which seeks: fast if few pictures of a long video are needed.

Only for files that `SeekRule` accepts. decord has no package for some machines (Linux on ARM); it is optional.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.video.packets import Facts
from flowmask.models.errors import DataError

_NO_REPEATS = 1e-9  # share of pictures that a neighbour may replace if they can't be decoded


class SeekingReader:
    """Pictures of one file by their number. Not thread safe."""

    def __init__(self, path: Path, facts: Facts) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # otherwise FFmpeg would print its own lines
        self._path = path
        self._errors = (RuntimeError, IndexError, decord.DECORDError)
        try:
            self._reader: Any = decord.VideoReader(
                f"file:{path}", ctx=decord.cpu(0), num_threads=1, fault_tol=_NO_REPEATS
            )
            self.agrees = len(self._reader) == facts.count and tuple(self._reader.get_key_indices()) == facts.keys
        except self._errors:
            self.agrees = False

    def frames(self, ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        """rgb8 [H W 3] of each of the sorted, distinct ids."""
        try:
            decoded = self._reader.get_batch(ids).asnumpy()
        except self._errors as error:
            raise DataError(
                f"{self._path}: truncated or damaged: a frame cannot be decoded ({_reason(error)})"
            ) from None
        if len(decoded) != len(ids):
            raise DataError(f"{self._path}: truncated: {len(decoded)} of the {len(ids)} frames asked for decode")
        return list(decoded)


def seeking_reader(path: Path, facts: Facts) -> SeekingReader | None:
    """A reader that seeks, if the rule accepts the file and decord is installed and sees the same packets."""
    if not facts.seekable:
        return None
    try:
        reader = SeekingReader(path, facts)
    except (ImportError, OSError):  # not installed, or a library is missing: `flowmask doctor` reports it
        return None
    return reader if reader.agrees else None


def _reason(error: Exception) -> str:
    """The end of decord's message, without its time, addresses and stack."""
    said = str(error).partition("Stack trace")[0]
    said = re.sub(r"\[\d\d:\d\d:\d\d\]\s*|\b0x[0-9a-fA-F]+\b", "", said)
    return " ".join(said.split())[-160:]
