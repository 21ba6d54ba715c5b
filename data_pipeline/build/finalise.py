"""Sidecars to index and manifest: the step after which a folder is a cache.

Reads the sidecars twice: once to count, once to write into a mapped file. So memory does not grow with the number
of examples.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from flowmask.data_pipeline.build.records import Shape, Sidecar, read_sidecar
from flowmask.data_pipeline.cache import index, manifest, quarantine
from flowmask.data_pipeline.cache.manifest import BucketEntry, Fingerprint, IndexEntry, Manifest, ShardEntry
from flowmask.data_pipeline.cache.shards import FOLDER, cache_file, remove_leftovers, shard_name, write_file
from flowmask.data_pipeline.plan.units import BuildPlan
from flowmask.models.errors import CacheError, DataError
from flowmask.models.files import remove_known, sha256_of_open


def finalise(out: Path, plan: BuildPlan, *, make: Callable[[int], None] | None = None) -> Manifest:
    """Write the index, then the manifest; every unit must be finished. DataError if no example is left.

    make: makes a unit again if its tar is damaged: workers take a unit for finished when its files exist
    CacheError if the plan has changed since it was written.
    """
    plan.refuse_changed()
    for folder in (out, out / FOLDER):
        remove_leftovers(folder)  # all units are done, so no other worker writes

    def sidecars() -> Iterator[Sidecar]:
        return _sidecars(out, plan, make=make)

    totals = count(sidecars(), views=plan.fingerprint.fields["cache.views"])
    if not totals.buckets:
        raise DataError(
            "no example is left: every clip is unreadable or has only empty masks; see cache.drop_empty_masks"
        )
    with cache_file(out / quarantine.FILE) as lines:
        lines.write(quarantine.to_bytes(quarantine.read(plan.folder / quarantine.FILE)))
        for sidecar in sidecars():
            lines.write(quarantine.to_bytes(sidecar.quarantined))
    with cache_file(out / index.FILE) as file:
        entry = write_index(file, sidecars(), buckets=totals.buckets)
    result = make_manifest(plan.fingerprint, plan.facts, totals, index_entry=entry)
    write_file(out / manifest.FILE, result.to_bytes())
    return result


def count(sidecars: Iterable[Sidecar], *, views: int) -> "Totals":
    """The sums of all sidecars, in the order of their units."""
    counts: Counter[tuple[Shape, int]] = Counter()
    totals = Totals()
    view = 1 + index.COLUMNS.index("view")
    for sidecar in sidecars:
        totals.add(sidecar)
        counts.update((sidecar.shapes[row[0]], row[view]) for row in sidecar.examples)
    totals.buckets = _buckets(counts, views=views)
    totals.name_shapes()
    return totals


def make_manifest(
    fingerprint: Fingerprint, facts: Mapping[str, Any], totals: "Totals", *, index_entry: IndexEntry
) -> Manifest:
    """The manifest: a function of the plan (its fingerprint and facts), the sidecars and the index."""
    fields = fingerprint.fields
    return Manifest(
        fingerprint=fingerprint,
        dtype=fields["cache.dtype"],
        views=fields["cache.views"],
        latent_channels=facts["latent_channels"],
        latents_mean=facts["latents_mean"],
        latents_std=facts["latents_std"],
        text_dim=totals.text_dim,
        longest_text_tokens=totals.longest_text_tokens,
        pixel_norm=fields["cache.pixel_norm"],
        lowercase=fields["cache.lowercase"],
        clips=totals.clips,
        examples=sum(sum(bucket.examples) for bucket in totals.buckets),
        dropped_empty_masks=totals.dropped,
        quarantined_clips=totals.quarantined,
        role=facts["role"],
        leaks=facts["leaks"],
        unreadable_videos=facts["unreadable_videos"],
        no_target=totals.no_target,
        partly_annotated=totals.partly_annotated,
        buckets=totals.buckets,
        index=index_entry,
        environments=totals.environments,
        shards=totals.shards,
    )


class Totals:
    """The manifest's facts about all shards together."""

    def __init__(self) -> None:
        self.buckets: list[BucketEntry] = []
        self.clips = self.dropped = self.quarantined = self.text_dim = self.longest_text_tokens = 0
        self.no_target = self.partly_annotated = 0
        self.environments: list[dict[str, str]] = []
        self.shards: list[ShardEntry] = []
        self._shapes: list[Counter[Shape]] = []

    def add(self, sidecar: Sidecar) -> None:
        self.clips += sidecar.records
        self.dropped += sidecar.dropped_empty_masks
        self.no_target += sidecar.no_target
        self.partly_annotated += sidecar.partly_annotated
        self.quarantined += len(sidecar.quarantined)
        if not sidecar.records:
            return
        if sidecar.made_with not in self.environments:
            self.environments.append(sidecar.made_with)
        self.text_dim = sidecar.text_dim
        tokens = 1 + index.COLUMNS.index("text_tokens")
        self.longest_text_tokens = max(self.longest_text_tokens, *(row[tokens] for row in sidecar.examples))
        self._shapes.append(Counter(sidecar.shapes[row[0]] for row in sidecar.examples))
        self.shards.append(
            ShardEntry(
                file=shard_name(sidecar.unit),
                size=sidecar.size,
                sha256=sidecar.sha256,
                records=sidecar.records,
                made_with=self.environments.index(sidecar.made_with),
                view=sidecar.examples[0][1 + index.COLUMNS.index("view")],
            )
        )

    def name_shapes(self) -> None:
        """Set the number of examples per bucket of each shard; the buckets have their numbers now."""
        shapes = [(bucket.frames, bucket.height, bucket.width) for bucket in self.buckets]
        self.shards = [
            shard.model_copy(update={"examples": [counts[shape] for shape in shapes]})
            for shard, counts in zip(self.shards, self._shapes, strict=True)
        ]


def _sidecars(out: Path, plan: BuildPlan, *, make: Callable[[int], None] | None) -> Iterator[Sidecar]:
    for unit in range(plan.clip_units):
        sidecar = read_sidecar(out / FOLDER, unit)
        if sidecar is None and make is not None:
            make(unit)
            sidecar = read_sidecar(out / FOLDER, unit)
        if sidecar is None:
            raise CacheError(f"{out / FOLDER / shard_name(unit)} was removed while the cache was built; build again")
        yield sidecar


def _buckets(counts: Counter[tuple[Shape, int]], *, views: int) -> list[BucketEntry]:
    """Buckets in the order of their shapes; example ids follow (bucket, view) without gaps."""
    buckets, first = [], 0
    for frames, height, width in sorted({shape for shape, _ in counts}):
        examples = [counts[(frames, height, width), view] for view in range(views)]
        firsts = [first + sum(examples[:view]) for view in range(views)]
        buckets.append(BucketEntry(frames=frames, height=height, width=width, first=firsts, examples=examples))
        first += sum(examples)
    return buckets


def write_index(file: IO[bytes], sidecars: Iterable[Sidecar], *, buckets: Sequence[BucketEntry]) -> IndexEntry:
    """Write the index into an empty file that is open for reading too; returns its size and hash."""
    rows = sum(sum(bucket.examples) for bucket in buckets)
    header = {"descr": np.lib.format.dtype_to_descr(index.ROW), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)
    start = file.tell()
    file.truncate(start + rows * index.ROW.itemsize)
    file.flush()
    table = np.memmap(file, dtype=index.ROW, mode="r+", offset=start, shape=(rows,))
    place = {(b.frames, b.height, b.width): number for number, b in enumerate(buckets)}
    cursor = {(number, view): first for number, b in enumerate(buckets) for view, first in enumerate(b.first)}
    for sidecar in sidecars:
        for shape, *values in sidecar.examples:
            row = dict(zip(index.COLUMNS, values, strict=True))
            bucket = place[sidecar.shapes[shape]]
            row["bucket"], row["unused"] = bucket, 0
            table[cursor[bucket, row["view"]]] = tuple(row[name] for name in index.ROW.names or ())
            cursor[bucket, row["view"]] += 1
    table.flush()
    file.seek(0)
    sha256 = sha256_of_open(file)
    return IndexEntry(size=start + rows * index.ROW.itemsize, sha256=sha256)


def clear_work(work: Path) -> None:
    """Delete the files of a build in `work/`; other files stay."""
    with suppress(OSError):  # a slower worker still writes there, and clears it later
        remove_known(work, _is_work)


def _is_work(relative: str) -> bool:
    """Whether a build makes this file below `work/`."""
    return bool(
        re.fullmatch(r"claims/[^/]+|texts/(\.tmp-)?text-[^/]+|quarantine/[^/]+|weights\.json|\.tmp-[^/]+", relative)
    )
