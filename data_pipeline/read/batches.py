"""What training opens: a cache, several, or a stream of one; the order of its examples; and their batches.

The one place that knows which kind of reading a config asks for.
"""

from typing import Any

from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read import mixture
from flowmask.data_pipeline.read.loader import Loader
from flowmask.data_pipeline.read.mixture import MixtureReader
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.read.stream import StreamLoader, StreamReader
from flowmask.data_pipeline.read.stream_plan import StreamPlan

Reader = CacheReader | MixtureReader | StreamReader
Plan = mixture.Plan | StreamPlan
Batches = Loader | StreamLoader


def open_reader(data: LoaderConfig, *, check: bool = True, pin: bool = False) -> Reader:
    """What a config names, opened; see `CacheReader` for `check` and `pin`."""
    if data.mode == "stream":
        return StreamReader(data, pin=pin)
    return mixture.open_reader(data, check=check, pin=pin)


def plan_for(reader: Reader, *, global_batch: int, seed: int, remainder: str) -> Plan:
    """The order in which training reads what was opened."""
    if isinstance(reader, StreamReader):
        return reader.plan(global_batch=global_batch, seed=seed)
    return mixture.plan_for(reader, global_batch=global_batch, seed=seed, remainder=remainder)


def open_batches(reader: Reader, plan: Plan, *, prefetch_batches: int, **settings: Any) -> Batches:
    """This rank's batches in the plan's order; `settings` are those of `Loader`."""
    if isinstance(reader, StreamReader):
        assert isinstance(plan, StreamPlan)
        return StreamLoader(reader, plan, **settings)
    assert not isinstance(plan, StreamPlan)
    return Loader(reader, plan, prefetch_batches=prefetch_batches, **settings)
