"""Reading videos by decord, which seeks: quick where few pictures of a long video are asked for.

Only for files that `SeekRule` admits. decord has no package for some machines (Linux on ARM); it is optional.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.video.packets import Facts
from flowmask.models.errors import DataError

_NO_REPEATS = 1e-9  # part of pictures that may be replaced by a neighbour where they don't decode


class SeekingReader:
    """Pictures of one file by their number. Not for several threads at once."""

    def __init__(self, path: Path, facts: Facts) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # FFmpeg would write its own lines beside ours
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
    """A reader that seeks, if the rule admits the file and decord is there and sees the same packets."""
    if not facts.seekable:
        return None
    try:
        reader = SeekingReader(path, facts)
    except (ImportError, OSError):  # not installed, or a library that it needs is missing: `flowmask doctor` says so
        return None
    return reader if reader.agrees else None


def _reason(error: Exception) -> str:
    """The end of what decord says, without the time, addresses and stack that its messages carry."""
    said = str(error).partition("Stack trace")[0]
    said = re.sub(r"\[\d\d:\d\d:\d\d\]\s*|\b0x[0-9a-fA-F]+\b", "", said)
    return " ".join(said.split())[-160:]
