"""The index of a cache: one fixed-size row per example, with the byte range of every tensor it needs.

Rows are sorted by (bucket, view), then in the order of the plan, so that a row number is an example id and
the examples of a bucket and view are contiguous. Read memory-mapped: a process pays for the pages it
touches.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowmask.models.errors import CacheError

FILE = "index.npy"
ROW = np.dtype(
    [
        ("video_mean", "<u8"),  # offsets are bytes from the start of the shard's tar file
        ("video_logvar", "<u8"),
        ("mask_mean", "<u8"),
        ("text", "<u8"),
        ("short_text", "<u8"),  # the sentence cut to SHORT_TEXT tokens, where it is longer than that
        ("record", "<u8"),  # the record's JSON
        ("record_length", "<u4"),
        ("shard", "<u4"),
        ("bucket", "<u2"),
        ("view", "<u2"),
        ("mask", "<u2"),  # j of the record's masks
        ("expression", "<u2"),  # place in the record's expressions
        ("text_tokens", "<u2"),
        ("short_text_tokens", "<u2"),  # 0: not stored, the whole sentence is short enough
        ("unused", "<u4"),
    ]
)
COLUMNS = tuple(name for name in ROW.names or () if name not in ("bucket", "unused"))


def open_index(folder: Path, *, rows: int) -> NDArray[np.void]:
    """The memory-mapped index of a finished cache; CacheError if missing, short or of another layout."""
    path = folder / FILE
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CacheError(f"{path}: the index cannot be read ({error}); run `flowmask cache verify {folder}`") from error
    if index.dtype != ROW or index.shape != (rows,):
        raise CacheError(
            f"{path}: {index.shape} rows of {index.dtype.itemsize} bytes, the manifest says {rows} of "
            f"{ROW.itemsize}: damaged, or written by another version; build the cache again"
        )
    return index
