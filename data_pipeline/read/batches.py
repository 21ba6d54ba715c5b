"""Opens the data of a training: a cache, several, or a stream; the order of the examples; and their batches.

The only place that chooses the kind of reading by the config.
"""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read.epoch_plan import EpochPlan
from flowmask.data_pipeline.read.loader import Loader
from flowmask.data_pipeline.read.mixture import IndexedPlan, IndexedReader, MixturePlan, MixtureReader
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.read.stored import StoredFiles
from flowmask.data_pipeline.read.stream import StreamLoader, StreamReader
from flowmask.data_pipeline.read.stream_plan import StreamPlan
from flowmask.models.errors import CacheError

Reader = IndexedReader | StreamReader
Plan = IndexedPlan | StreamPlan
Batches = Loader | StreamLoader


def open_reader(data: LoaderConfig, *, check: bool = True, pin: bool = False) -> Reader:
    """Opens the data of a config; see `CacheReader` for `check` and `pin`."""
    if data.mode == "stream":
        return StreamReader(data, pin=pin)
    if data.cache is not None:
        return open_cache(data.cache, data, check=check, pin=pin)
    weights = [Fraction(str(entry.weight)) for entry in data.mix]
    opened: list[CacheReader] = []
    try:
        for entry in data.mix:
            opened.append(open_cache(entry.cache, data, check=check, pin=pin))
        return MixtureReader(opened, shares=[weight / sum(weights) for weight in weights])
    except CacheError:
        for reader in opened:
            reader.close()
        raise


def open_cache(place: Path | str, data: LoaderConfig, *, check: bool = True, pin: bool = False) -> CacheReader:
    """One cache, read by its index: a folder, or a URL through the local disk in `data`."""
    if isinstance(place, Path):
        return CacheReader(place, check=check, pin=pin)
    assert data.local_cache is not None, "asked for by the config"
    files = StoredFiles(place, local=data.local_cache, local_gib=data.local_cache_gib, retries=data.retries)
    return CacheReader(files, check=check, pin=pin)


def caches_of(reader: Reader) -> list[CacheReader | StreamReader]:
    """Every cache that is read."""
    return list(reader.caches) if isinstance(reader, MixtureReader) else [reader]


def plan_for(reader: Reader, *, global_batch: int, seed: int, remainder: str) -> Plan:
    """The order in which training reads the opened data."""
    if isinstance(reader, StreamReader):
        return reader.plan(global_batch=global_batch, seed=seed)
    rest: dict[str, Any] = {"global_batch": global_batch, "seed": seed, "remainder": remainder}
    if isinstance(reader, CacheReader):
        return EpochPlan(reader.buckets, **rest)
    buckets = [
        [replace(bucket, name=f"{cache.place}: {bucket.name}") for bucket in cache.buckets] for cache in reader.caches
    ]
    return MixturePlan(buckets, shares=reader.shares, **rest)


def open_batches(reader: Reader, plan: Plan, *, prefetch_batches: int, **settings: Any) -> Batches:
    """This rank's batches in the plan's order; `settings` are those of `Loader`."""
    if isinstance(reader, StreamReader):
        assert isinstance(plan, StreamPlan)
        return StreamLoader(reader, plan, **settings)
    assert not isinstance(plan, StreamPlan)
    return Loader(reader, plan, prefetch_batches=prefetch_batches, **settings)
