"""Batches for one rank, read ahead by threads, in the plan's order for any number of ranks and threads.

The state is the step number: nothing else is needed to continue. An error in a reading thread
is raised at its step.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.read.epoch_plan import PlannedBatch, passes
from flowmask.data_pipeline.read.mixture import IndexedPlan, IndexedReader
from flowmask.data_pipeline.read.reader import NEEDS

_MASK = (1 << 64) - 1


@dataclass
class Batch:
    """One micro-batch of one rank; tensors that the objective does not need are None.

    video_mean, video_logvar, mask_mean  [b 16 f h w] raw, stored dtype
    text         [b L D] stored dtype, L at least the longest here, zeros after a shorter one's end; see `padded_text`
    mask_pixels  bool [b F H W]    annotated  bool [b F]: the frames that count in loss and score; None: all do
    example_ids  int64 [b]      epochs  int64 [b]         positions  int64 [b], positions in the global batch
    keys         one integer per example, mix64(seed, epoch, example, step): its only source of randomness
    digest       sum of mix64(position, example id) mod 2^64: identifies the delivered examples
    draws        random tensors [b ...] by name, made by the loader's `prepare`
    finite       bool [b] by part of the loss: whether it is finite for each example; set by the loss
    made_s, copied_s  seconds to make the batch, and the part of them for copying it to its device
    """

    step: int
    example_ids: Tensor
    positions: Tensor
    epochs: Tensor
    keys: list[int]
    digest: int
    video_mean: Tensor | None = None
    video_logvar: Tensor | None = None
    mask_mean: Tensor | None = None
    text: Tensor | None = None
    text_tokens: int = 0
    mask_pixels: Tensor | None = None
    annotated: Tensor | None = None
    draws: dict[str, Tensor] = field(default_factory=dict)
    finite: dict[str, Tensor] = field(default_factory=dict)
    made_s: float = 0.0
    copied_s: float = 0.0

    def __len__(self) -> int:
        return len(self.keys)

    def padded_text(self) -> Tensor:
        """Text as the DiT sees it, [b text_tokens D], zeros after each sentence.

        Made as late as possible, because most of it is zeros.
        """
        assert self.text is not None
        missing = max(0, self.text_tokens - self.text.shape[1])
        return torch.nn.functional.pad(self.text, (0, 0, 0, missing))

    def note_finite(self, **parts: Tensor) -> None:
        """Store in `finite`, for each [b ...] part of the loss, which examples are finite.

        Does not wait for the device.
        """
        for name, part in parts.items():
            self.finite[name] = part.detach().isfinite().reshape(len(part), -1).all(1)

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its data and draws on a device; ids and keys stay on the host."""
        held = {name: getattr(self, name) for name in (*NEEDS, "annotated")}
        where = torch.device(device)
        if where.type == "cpu" and all(t is None or t.device == where for t in held.values()):
            return self
        moved = {name: t.to(device, non_blocking=True) for name, t in held.items() if t is not None}
        draws = {name: draw.to(device, non_blocking=True) for name, draw in self.draws.items()}
        return replace(self, draws=draws, **moved)


def unchanged(batch: Batch) -> Batch:
    return batch


def copied(batch: Batch, device: torch.device | str) -> Batch:
    """The batch on a device, and the seconds this took; a GPU may still be copying when it returns."""
    began = perf_counter()
    there = batch.to(device)
    there.copied_s = perf_counter() - began
    return there


class ChecksText(Protocol):
    """A reader that raises ConfigError if a sentence is stored neither whole nor cut to `text_tokens`."""

    def check_text_tokens(self, text_tokens: int) -> None: ...


class Steps(ABC):
    """An endless iterator of steps: an item is this rank's list of micro-batches; `step` is the next item's number.

    `prepare` runs once on each micro-batch. `wait_s` is the time the consumer has waited; `copy_wait_s` is the part of
    it for copying to the device, in the same proportion as in the time to make those batches. Use it as a context
    manager, or call `close`, to end its threads.
    """

    def __init__(
        self,
        reader: ChecksText,
        *,
        seed: int,
        needs: Collection[str],
        text_tokens: int,
        prepare: Callable[[Batch], Batch] = unchanged,
        start_step: int = 0,
    ):
        if "text" in needs:
            reader.check_text_tokens(text_tokens)
        self.needs, self.text_tokens, self._prepare = frozenset(needs), text_tokens, prepare
        self._seed, self.step = seed, start_step
        self.wait_s, self.copy_wait_s = 0.0, 0.0

    def batch(
        self,
        tensors: dict[str, Tensor],
        *,
        step: int,
        first: int,
        ids: NDArray[np.int64],
        epochs: NDArray[np.int64],
        began: float,
    ) -> Batch:
        """The micro-batch of these examples; the first is at position `first` in the global batch of a step.

        tensors: [b ...] by name, as from `CacheReader.read`    ids, epochs: int64 [b]
        began: the start of making it, by `perf_counter`
        """
        places, numbers = range(first, first + len(ids)), ids.tolist()
        given: dict[str, Any] = dict(tensors)
        batch = Batch(
            step=step,
            example_ids=torch.tensor(numbers),
            positions=torch.tensor(places),
            epochs=torch.from_numpy(epochs.copy()),
            keys=[mix64(self._seed, e, i, step) for e, i in zip(epochs.tolist(), numbers, strict=True)],
            digest=sum(mix64(place, i) for place, i in zip(places, numbers, strict=True)) & _MASK,
            text_tokens=self.text_tokens,
            **given,
        )
        made = self._prepare(batch)
        made.made_s = perf_counter() - began
        return made

    @abstractmethod
    def batches(self) -> list[Batch]:
        """The micro-batches of `self.step`."""

    @abstractmethod
    def close(self) -> None:
        """Stop reading ahead and join the threads."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        started = perf_counter()
        batches = self.batches()
        self.step += 1
        waited = perf_counter() - started
        self.wait_s += waited
        made_s = sum(batch.made_s for batch in batches)
        self.copy_wait_s += waited * sum(batch.copied_s for batch in batches) / made_s if made_s else 0.0
        return batches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Loader(Steps):
    """Batches from a cache's files, read ahead by threads; with 0 `threads` they are read on request."""

    def __init__(
        self,
        reader: IndexedReader,
        plan: IndexedPlan,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        threads: int = 2,
        prefetch_batches: int = 4,
        **rest: Any,
    ):
        super().__init__(reader, seed=plan.seed, **rest)
        self.reader, self.plan, self.micro_batch = reader, plan, micro_batch
        share = micro_batch * passes(plan.global_batch, micro_batch=micro_batch, world_size=world_size)
        self._places = range(rank * share, (rank + 1) * share)
        self._depth = prefetch_batches
        workers = threads * prefetch_batches if reader.waits else threads  # all are requested from a server at once
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if threads else None
        self._threads = threads
        self._ahead: deque[list[Future[list[Batch]]]] = deque()
        self._submitted = self.step

    def batches(self) -> list[Batch]:
        if self._pool is None:
            return self._read_all(self.plan[self.step], self._firsts())
        while len(self._ahead) < self._depth:
            self._submit(self._pool)
        batches = [batch for future in self._ahead[0] for batch in future.result()]
        self._ahead.popleft()
        self._submit(self._pool)
        return batches

    def _firsts(self) -> range:
        return self._places[:: self.micro_batch]

    def _submit(self, pool: ThreadPoolExecutor) -> None:
        planned, firsts = self.plan[self._submitted], self._firsts()
        several = -(-len(firsts) // self._threads)  # one future per micro-batch would cost a third of the reading time
        parts = [firsts[start : start + several] for start in range(0, len(firsts), several)]
        self._ahead.append([pool.submit(self._read_all, planned, part) for part in parts])
        self._submitted += 1

    def _read_all(self, planned: PlannedBatch, firsts: Sequence[int]) -> list[Batch]:
        """The micro-batches at these neighbouring positions, from one read of all their examples."""
        start, stop = firsts[0], firsts[-1] + self.micro_batch
        ids, epochs = planned.example_ids[start:stop].astype(np.int64), planned.epochs[start:stop]
        began = perf_counter()
        tensors = self.reader.read(ids, needs=self.needs, text_tokens=self.text_tokens)
        batches = []
        for first in firsts:
            own = slice(first - start, first - start + self.micro_batch)
            parts = {name: tensor[own] for name, tensor in tensors.items()}
            of: dict[str, Any] = {"step": planned.step, "first": first, "ids": ids[own], "epochs": epochs[own]}
            batches.append(self.batch(parts, **of, began=began))
            began = perf_counter()
        return batches

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
