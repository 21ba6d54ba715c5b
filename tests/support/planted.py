"""Faults planted into chosen steps of one rank of a real run: a slow disk, copy or computation, or a hang."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest


class Fault(NamedTuple):
    """`seconds` more in each step from `first` to `last` (counted from 0) of one rank; kind: one of KINDS."""

    kind: str
    rank: int
    first: int
    last: int
    seconds: float


KINDS = ("disk", "copy", "rank", "hang")


@contextmanager
def planted(faults: Sequence[Fault]) -> Iterator[None]:
    """While inside, runs of this process have these faults."""
    from flowmask.data_pipeline.read.loader import Batch, Loader
    from flowmask.data_pipeline.read.reader import CacheReader
    from flowmask.trainer.objectives.flow_matching import FlowMatching

    now = threading.local()
    read_all, read, to, loss = Loader._read_all, CacheReader.read, Batch.to, FlowMatching.loss

    def be_slow(step: int, *kinds: str) -> None:
        time.sleep(sum(one.seconds for one in faults if one.kind in kinds and one.first <= step <= one.last))

    def slow_read_all(self: Loader, batch: Any, firsts: Any) -> Any:
        now.step = batch.step
        try:
            return read_all(self, batch, firsts)
        finally:
            del now.step

    def slow_read(self: CacheReader, *args: Any, **named: Any) -> Any:
        if hasattr(now, "step"):  # not in the reads of a validator
            be_slow(now.step, "disk")
        return read(self, *args, **named)

    def slow_to(self: Batch, device: Any) -> Batch:
        be_slow(self.step, "copy")
        return to(self, device)

    def slow_loss(self: FlowMatching, module: Any, batch: Batch) -> Any:
        be_slow(batch.step, "rank", "hang")
        return loss(self, module, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "_read_all", slow_read_all)
        patch.setattr(CacheReader, "read", slow_read)
        patch.setattr(Batch, "to", slow_to)
        patch.setattr(FlowMatching, "loss", slow_loss)
        yield
