"""The index of a cache: one fixed-size row per example, with the byte range of every tensor it needs.

Rows are sorted by (bucket, view), then in the order of the plan, so that a row number is an example id and
the examples of a bucket and view are contiguous. Read memory-mapped: a process loads only the pages it uses.
With `check` its hash is compared with the manifest, by reading the file once, not through the map.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.cache.manifest import IndexEntry
from flowmask.models.errors import CacheError
from flowmask.models.files import sha256_of_open
from flowmask.models.stored.regular import open_regular

FILE = "index.npy"
ROW = np.dtype(
    [
        ("video_mean", "<u8"),  # offsets are bytes from the start of the shard's tar file
        ("video_logvar", "<u8"),
        ("mask_mean", "<u8"),
        ("text", "<u8"),
        ("short_text", "<u8"),  # the sentence cut to SHORT_TEXT tokens, if it is longer
        ("record", "<u8"),  # the record's JSON
        ("record_length", "<u4"),
        ("shard", "<u4"),
        ("bucket", "<u2"),
        ("view", "<u2"),
        ("mask", "<u2"),  # index in the record's masks
        ("expression", "<u2"),  # index in the record's expressions
        ("text_tokens", "<u2"),
        ("short_text_tokens", "<u2"),  # 0: not stored, the whole sentence is short enough
        ("unused", "<u4"),
    ]
)
COLUMNS = tuple(name for name in ROW.names or () if name not in ("bucket", "unused"))


def open_index(path: Path, entry: IndexEntry, *, home: Path, rows: int, check: bool) -> NDArray[np.void]:
    """The index of a finished cache, memory-mapped, `ROW` [rows]; raises CacheError if missing, damaged or of another
    layout.

    home: the folder of the cache; links must not lead out of it
    """
    damaged = None
    try:
        with os.fdopen(open_regular(path, inside=home), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != entry.size:
                damaged = f"{size} bytes, the manifest says {entry.size}"
            elif check and sha256_of_open(file) != entry.sha256:
                damaged = "its SHA-256 is not that of the manifest"
        index = np.load(path, mmap_mode="r", allow_pickle=False) if damaged is None else None
    except OSError as error:
        damaged = f"it cannot be read: {error.strerror}"
    except (ValueError, EOFError, RecursionError, MemoryError, OverflowError) as error:
        damaged = f"it cannot be read: {' '.join(str(error).split())[:200]}"
    if damaged is not None:
        raise CacheError(f"{path}: the index is damaged: {damaged}; run `flowmask cache repair {home}`")
    assert index is not None
    if index.dtype != ROW or index.shape != (rows,):
        raise CacheError(
            f"{path}: {index.shape} rows of {index.dtype.itemsize} bytes, the manifest says {rows} of "
            f"{ROW.itemsize}: damaged, or written by another version; build the cache again"
        )
    return index
