"""The content of a finished cache in numbers: `flowmask cache inspect` shows them.

All numbers come from the index, the manifest and the records; no latent is read. Memory does not grow with
the cache. Checking the bytes is the task of `verify`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.cache.manifest import Manifest
from flowmask.data_pipeline.plan.units import FOLDER as PLAN
from flowmask.data_pipeline.plan.units import read_plan
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.models.errors import CacheError

OnProgress = Callable[[str, int, int], None]
_ROWS = 1 << 18  # rows of the index counted at once


@dataclass
class CacheFacts:
    """Numbers of a cache. Histograms are int64 [largest value + 1]: element i is the number of items with the value i.

    bytes_by_kind:     video, masks, text, json, and the overhead of tar files
    clips_of_bucket:   int64 [buckets], clips in the order of the manifest's buckets
    tokens:            histogram [n] of examples by the number of tokens of their sentence
    examples_per_clip: histogram [n] of clips by their number of examples
    objects:           histogram [n] of examples by the number of annotations in their mask
    planned:           examples of the plan, stored or dropped; None if the plan cannot be read
    """

    manifest: Manifest
    bytes_by_kind: dict[str, int]
    clips_of_bucket: NDArray[np.int64]
    tokens: NDArray[np.int64]
    examples_per_clip: NDArray[np.int64]
    objects: NDArray[np.int64]
    masks: int = 0
    sentences: int = 0  # distinct ones, counted per clip
    flipped: int = 0
    cropped: int = 0
    planned: int | None = None


def count(reader: CacheReader, *, on_progress: OnProgress = lambda *_: None) -> CacheFacts:
    """Numbers of a whole cache, in memory that does not grow with it."""
    manifest = reader.manifest
    facts = CacheFacts(
        manifest,
        dict.fromkeys(("video", "masks", "text", "json"), 0),
        clips_of_bucket=np.zeros(len(manifest.buckets), np.int64),
        tokens=np.zeros(1, np.int64),
        examples_per_clip=np.zeros(1, np.int64),
        objects=np.zeros(1, np.int64),
        planned=_planned(reader.folder),
    )
    clips = 0
    for start, rows in _chunks(reader.index):
        starts, sizes = _runs(rows)
        _count_rows(facts, rows, starts, sizes, itemsize=reader.dtype.itemsize)
        for first, size in zip(starts, sizes, strict=True):
            with naming_damage(reader, start + int(first)):
                _count_record(facts, reader.record(start + int(first)), rows[first : first + size])
        clips += len(starts)
        on_progress("records", clips, manifest.clips)
    stored = sum(shard.size for shard in manifest.shards)
    facts.bytes_by_kind["headers, padding"] = stored - sum(facts.bytes_by_kind.values())
    return facts


@contextmanager
def naming_damage(reader: CacheReader, example_id: int) -> Iterator[None]:
    """CacheError if an example's record lacks its standard content."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CacheError(
            f"{reader.folder}: the record of example {example_id} is damaged "
            f"({type(error).__name__}: {error}); see `flowmask cache verify {reader.folder}`"
        ) from error


def _planned(folder: Path) -> int | None:
    """A finished cache is complete without its plan, so an unreadable plan is no error here."""
    try:
        plan = read_plan(folder / PLAN)
        if plan is None:
            return None
        return sum(len(texts) for unit in range(plan.clip_units) for _, texts in plan.unit_clips(unit))
    except (CacheError, OSError, ValueError):
        return None


def _chunks(index: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Ranges of rows that end where a clip ends: the examples of a clip are consecutive."""
    start = 0
    while start < len(index):
        stop = min(start + _ROWS, len(index))
        while stop < len(index) and _clip(index[stop]) == _clip(index[stop - 1]):
            stop += 1
        yield start, np.asarray(index[start:stop])
        start = stop


def _clip(row: Any) -> tuple[int, int]:
    return int(row["shard"]), int(row["record"])


def _runs(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first row of each clip, and the clip's number of examples."""
    other = (np.diff(rows["shard"].astype(np.int64)) != 0) | (np.diff(rows["record"].astype(np.int64)) != 0)
    starts = np.concatenate([[0], np.flatnonzero(other) + 1])
    return starts, np.diff(starts, append=len(rows))


def _count_rows(
    facts: CacheFacts, rows: NDArray[Any], starts: NDArray[np.int64], sizes: NDArray[np.int64], *, itemsize: int
) -> None:
    manifest, kinds = facts.manifest, facts.bytes_by_kind
    latent = np.array([manifest.latent_channels * np.prod(b.latent_shape) * itemsize for b in manifest.buckets])
    firsts = rows[starts]
    facts.clips_of_bucket += np.bincount(firsts["bucket"], minlength=len(manifest.buckets))
    kinds["video"] += int(2 * latent[firsts["bucket"]].sum())
    kinds["json"] += int(firsts["record_length"].sum(dtype=np.int64))
    masks = rows[np.unique(rows[["shard", "mask_mean"]], return_index=True)[1]]
    facts.masks += len(masks)
    kinds["masks"] += int(latent[masks["bucket"]].sum())
    texts = rows[np.unique(rows[["shard", "text"]], return_index=True)[1]]
    facts.sentences += len(texts)
    tokens = texts["text_tokens"].sum(dtype=np.int64) + texts["short_text_tokens"].sum(dtype=np.int64)
    kinds["text"] += int(tokens) * manifest.text_dim * itemsize
    facts.tokens = _added(facts.tokens, np.bincount(rows["text_tokens"]))
    facts.examples_per_clip = _added(facts.examples_per_clip, np.bincount(sizes))


def _count_record(facts: CacheFacts, record: dict[str, Any], rows: NDArray[Any]) -> None:
    facts.flipped += bool(record["flip"])
    facts.cropped += record["crop"] is not None
    objects = [len(record["masks"][row["mask"]]["anno_ids"]) for row in rows]
    facts.objects = _added(facts.objects, np.bincount(objects))


def _added(total: NDArray[np.int64], more: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of two histograms; its length is that of the longer one."""
    longer, shorter = (total, more) if len(total) >= len(more) else (more, total)
    result = longer.astype(np.int64)
    result[: len(shorter)] += shorter
    return result
