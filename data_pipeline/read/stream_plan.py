"""The order of examples in a stream of shards, computed from the manifest and (seed, rank, step).

The shards of all epochs, each epoch shuffled, form one endless sequence; rank r of W reads every W-th shard. It
shuffles within a window: as many shards as hold `shuffle_examples` examples. A micro-batch has one bucket; examples
that do not fill one are carried to the next window. So each example is used once per epoch, at some rank, and the
position of a step is known without reading earlier shards. Refuses a manifest without the number of examples of each
shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.cache.manifest import Manifest
from flowmask.data_pipeline.randomness import mix64, mix64_array
from flowmask.data_pipeline.read.epoch_plan import PlannedBatch, passes
from flowmask.models.errors import CacheError, ConfigError

_SHARDS, _EXAMPLES, _TURNS = 5, 6, 7  # families of keys, in addition to those of epoch_plan and mixture
ID, EPOCH, SHARD = 0, 1, 2  # columns of Items
Items = NDArray[np.int64]  # [n 3]


@dataclass
class Window:
    """The examples that one rank shuffles together: micro-batches (bucket, Items) in order.

    `carried` waits for later ones.
    """

    batches: list[tuple[int, Items]]
    carried: Items

    def wanted(self) -> dict[int, set[int]]:
        """Ids of the examples that this window needs, by the shard that holds them."""
        items = np.concatenate([self.carried, *(items for _, items in self.batches)])
        return {int(shard): set(items[items[:, SHARD] == shard, ID].tolist()) for shard in _distinct(items)}


def _distinct(items: Items) -> list[int]:
    return list(dict.fromkeys(items[:, SHARD].tolist()))


class StreamPlan:
    """As `EpochPlan`, for streams. Example ids are those of the index, which is not fetched.

    Call `share` before `plan[step]`, which then knows only this rank's part of the global batch.
    """

    def __init__(self, manifest: Manifest, *, global_batch: int, seed: int, shuffle_examples: int):
        buckets = len(manifest.buckets)
        if any(len(shard.examples) != buckets for shard in manifest.shards):
            raise CacheError(
                "the manifest doesn't say how many examples each shard has: the cache was built by an older "
                "flowmask; build it again, or read it with data.mode=indexed"
            )
        self.global_batch, self.seed, self._window = global_batch, seed, shuffle_examples
        self.counts = np.array([shard.examples for shard in manifest.shards], np.int64).reshape(-1, buckets)
        views = np.array([shard.view for shard in manifest.shards], np.int64)
        self._of_view = [np.flatnonzero((views == view) & self.counts.any(1)) for view in range(manifest.views)]
        if not self.counts.any():
            raise ConfigError("the cache has no example to train on; see `dropped` in its manifest.json")
        self.first = np.zeros_like(self.counts)  # id of each shard's first example of each bucket
        for view, shards in enumerate(self._of_view):
            before = np.cumsum(self.counts[shards], axis=0) - self.counts[shards]
            self.first[shards] = before + np.array([bucket.first[view] for bucket in manifest.buckets])
        self._examples = [int(self.counts[shards].sum()) for shards in self._of_view]
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def share(self, *, rank: int, world_size: int, micro_batch: int) -> "StreamPlan":
        """Set this process's part of every global batch. Raises ConfigError if the batch can't be shared."""
        self.accumulation = passes(self.global_batch, micro_batch=micro_batch, world_size=world_size)
        self.rank, self.world_size, self.micro_batch = rank, world_size, micro_batch
        self._asked, self._asked_step = self.batches(0), 0
        return self

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        shards = self._of_view[epoch % len(self._of_view)]
        keys = mix64_array(mix64(self.seed, _SHARDS, epoch), shards.astype(np.uint64))
        return shards[np.argsort(keys, kind="stable")]

    def _shards(self) -> Iterator[tuple[int, int]]:
        """Epoch and shard, without end, of this rank."""
        passed = 0
        for epoch in count():
            order = self._order(epoch)
            for shard in order[(self.rank - passed) % self.world_size :: self.world_size].tolist():
                yield epoch, shard
            passed += len(order)

    def windows(self, step: int = 0) -> Iterator[Window]:
        """This rank's windows from a step on; the first one without examples of earlier steps."""
        skip = step * self.accumulation
        carried = np.empty((0, 3), np.int64)
        shards = self._shards()
        for number in count():
            items, held = [carried], 0
            while held < self._window:
                epoch, shard = next(shards)
                items.append(self._items(epoch, shard))
                held += len(items[-1])
            window = self._cut(np.concatenate(items), new_from=len(carried), number=number)
            carried = window.carried
            skipped = min(skip, len(window.batches))
            skip -= skipped
            window.batches = window.batches[skipped:]
            if window.batches:
                yield window

    def _items(self, epoch: int, shard: int) -> Items:
        ids = [np.arange(n) + first for first, n in zip(self.first[shard], self.counts[shard], strict=True)]
        numbers = np.concatenate(ids)
        return np.stack([numbers, np.full_like(numbers, epoch), np.full_like(numbers, shard)], axis=1)

    def _cut(self, items: Items, *, new_from: int, number: int) -> Window:
        """Micro-batches of shuffled items; those carried over, the first `new_from`, go first."""
        new = new_from + self._shuffle(len(items) - new_from, _EXAMPLES, number)
        items = np.concatenate([items[:new_from], items[new]])
        buckets = self._buckets(items)
        batches, left = [], []
        for bucket in np.unique(buckets).tolist():
            queue = items[buckets == bucket]
            whole = len(queue) // self.micro_batch * self.micro_batch
            batches += [(bucket, queue[at : at + self.micro_batch]) for at in range(0, whole, self.micro_batch)]
            left.append(queue[whole:])
        turns = self._shuffle(len(batches), _TURNS, number)
        return Window([batches[turn] for turn in turns.tolist()], np.concatenate(left))

    def _shuffle(self, size: int, family: int, number: int) -> NDArray[np.int64]:
        keys = mix64_array(mix64(self.seed, family, self.rank, number), np.arange(size, dtype=np.uint64))
        return np.argsort(keys, kind="stable")

    def _buckets(self, items: Items) -> NDArray[np.int64]:
        """The bucket of each item: the last bucket with a first id that is not above the item's id in its shard."""
        first, counts = self.first[items[:, SHARD]], self.counts[items[:, SHARD]]
        ids = items[:, ID, None]
        return np.argmax((first <= ids) & (ids < first + counts), axis=1)

    def batches(self, step: int) -> Iterator[list[tuple[int, Items]]]:
        """This rank's micro-batches (bucket, Items) of each step, without end."""
        row: list[tuple[int, Items]] = []
        for window in self.windows(step):
            for batch in window.batches:
                row.append(batch)
                if len(row) == self.accumulation:
                    yield row
                    row = []

    def __getitem__(self, step: int) -> PlannedBatch:
        """This rank's part of a step; cheap in increasing order."""
        if step < self._asked_step:
            self._asked, self._asked_step = self.batches(0), 0
        while True:
            row = next(self._asked)
            self._asked_step += 1
            if self._asked_step > step:
                break
        items = np.concatenate([items for _, items in row])
        return PlannedBatch(
            step=step, bucket=row[0][0], example_ids=items[:, ID].astype(np.uint64), epochs=items[:, EPOCH]
        )

    def first_step(self, epoch: int) -> int:
        """Number of steps that the examples of the first `epoch` epochs fill."""
        cycles, rest = divmod(epoch, len(self._examples))
        return (cycles * sum(self._examples) + sum(self._examples[:rest])) // self.global_batch

    def progress(self, step: int) -> float:
        """Number of epochs that all ranks together have read before `step`."""
        views = len(self._examples)
        cycles, rest = divmod(step * self.global_batch, sum(self._examples))
        for view, examples in enumerate(self._examples):
            if rest < examples:
                return cycles * views + view + rest / examples
            rest -= examples
        raise AssertionError("the rest is less than a cycle")

    def dropped(self) -> dict[str, list[int]]:
        """Examples lost in an epoch: always none."""
        return {}
