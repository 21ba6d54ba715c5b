"""Sidecars to index and manifest: the step after which a folder is a cache.

Two passes over the sidecars, one counting and one writing into a mapped file, so that memory does not grow
with the number of examples.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from data_pipeline import index, manifest
from data_pipeline.config import CacheBuildConfig
from data_pipeline.manifest import BucketEntry, FileEntry, Manifest, ShardEntry
from data_pipeline.records import Sidecar, read_sidecar
from data_pipeline.shards import FOLDER, remove_leftovers, shard_name, whole_file, write_file
from data_pipeline.units import Plan
from models.errors import CacheError, DataError

Shape = tuple[int, int, int]


def finalise(out: Path, plan: Plan, *, config: CacheBuildConfig) -> Manifest:
    """Write the index, then the manifest; every unit must be finished. DataError if no example is left."""
    for folder in (out, out / FOLDER):
        remove_leftovers(folder)  # all units are done, so nobody else writes
    views = config.cache.views
    counts: Counter[tuple[Shape, int]] = Counter()
    totals = _Totals()
    for sidecar in _sidecars(out, plan):
        totals.add(sidecar)
        view = 1 + index.COLUMNS.index("view")
        counts.update((sidecar.shapes[row[0]], row[view]) for row in sidecar.examples)
    if not counts:
        raise DataError("no example is left: every mask is empty in its clip; see cache.drop_empty_masks")
    buckets = _buckets(counts, views=views)
    with whole_file(out / index.FILE) as file:
        size, sha256 = _write_index(file, out, plan, buckets=buckets)
    result = Manifest(
        fingerprint=plan.fingerprint,
        dtype=config.cache.dtype,
        views=views,
        latent_channels=plan.facts["latent_channels"],
        latents_mean=plan.facts["latents_mean"],
        latents_std=plan.facts["latents_std"],
        text_dim=totals.text_dim,
        longest_text_tokens=totals.longest_text_tokens,
        pixel_norm=config.cache.pixel_norm,
        lowercase=config.cache.lowercase,
        clips=totals.clips,
        examples=sum(counts.values()),
        dropped_empty_masks=totals.dropped,
        buckets=buckets,
        index=FileEntry(file=index.FILE, size=size, sha256=sha256),
        environments=totals.environments,
        shards=totals.shards,
    )
    write_file(out / manifest.FILE, result.to_bytes())
    return result


class _Totals:
    """What the manifest says of all shards together."""

    def __init__(self) -> None:
        self.clips = self.dropped = self.text_dim = self.longest_text_tokens = 0
        self.environments: list[dict[str, str]] = []
        self.shards: list[ShardEntry] = []

    def add(self, sidecar: Sidecar) -> None:
        self.clips += sidecar.records
        self.dropped += sidecar.dropped_empty_masks
        if not sidecar.records:
            return
        if sidecar.made_with not in self.environments:
            self.environments.append(sidecar.made_with)
        self.text_dim = sidecar.text_dim
        tokens = 1 + index.COLUMNS.index("text_tokens")
        self.longest_text_tokens = max(self.longest_text_tokens, *(row[tokens] for row in sidecar.examples))
        self.shards.append(
            ShardEntry(
                file=shard_name(sidecar.unit),
                size=sidecar.size,
                sha256=sidecar.sha256,
                records=sidecar.records,
                made_with=self.environments.index(sidecar.made_with),
            )
        )


def _sidecars(out: Path, plan: Plan) -> Iterator[Sidecar]:
    for unit in range(plan.clip_units):
        sidecar = read_sidecar(out / FOLDER, unit)
        if sidecar is None:
            raise CacheError(
                f"{out / FOLDER / shard_name(unit)} was removed while the cache was built; build again"
            )
        yield sidecar


def _buckets(counts: Counter[tuple[Shape, int]], *, views: int) -> list[BucketEntry]:
    """Buckets in the order of their shapes; example ids run through (bucket, view) without gaps."""
    buckets, first = [], 0
    for frames, height, width in sorted({shape for shape, _ in counts}):
        examples = [counts[(frames, height, width), view] for view in range(views)]
        firsts = [first + sum(examples[:view]) for view in range(views)]
        buckets.append(
            BucketEntry(frames=frames, height=height, width=width, first=firsts, examples=examples)
        )
        first += sum(examples)
    return buckets


def _write_index(file: IO[bytes], out: Path, plan: Plan, *, buckets: list[BucketEntry]) -> tuple[int, str]:
    rows = sum(sum(bucket.examples) for bucket in buckets)
    header = {"descr": np.lib.format.dtype_to_descr(index.ROW), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)
    start = file.tell()
    file.truncate(start + rows * index.ROW.itemsize)
    file.flush()
    table = np.memmap(file, dtype=index.ROW, mode="r+", offset=start, shape=(rows,))
    place = {(b.frames, b.height, b.width): number for number, b in enumerate(buckets)}
    cursor = {(number, view): first for number, b in enumerate(buckets) for view, first in enumerate(b.first)}
    for sidecar in _sidecars(out, plan):
        for shape, *values in sidecar.examples:
            row = dict(zip(index.COLUMNS, values, strict=True))
            bucket = place[sidecar.shapes[shape]]
            row["bucket"], row["unused"] = bucket, 0
            table[cursor[bucket, row["view"]]] = tuple(row[name] for name in index.ROW.names or ())
            cursor[bucket, row["view"]] += 1
    table.flush()
    file.seek(0)
    return start + rows * index.ROW.itemsize, hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
