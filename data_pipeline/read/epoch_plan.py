"""The examples of every global batch, computed from (seed, step), never stored.

Each bucket is one endless stream of examples: its epochs' permutations concatenated, cut into global batches.
All arithmetic is exact, on Python integers and uint64; nothing depends on world size, workers or history.
Refuses an empty cache and, with `drop`, a bucket that is smaller than a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.randomness import mix64, mix64_array
from flowmask.models.errors import ConfigError

_ROUNDS = 8
_EXAMPLES, _BATCHES = 1, 2  # separate the keys of the two families of bijections
Uint64 = NDArray[np.uint64]


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch, all of one bucket; for a stream only this rank's part, n examples.

    example_ids: uint64 [n]    epochs: int64 [n], the epoch that each example belongs to
    """

    step: int
    bucket: int
    example_ids: Uint64
    epochs: NDArray[np.int64]


def passes(global_batch: int, *, micro_batch: int, world_size: int) -> int:
    """Micro-batches of a rank in each step; raises ConfigError if the processes can't share a global batch equally."""
    at_once = micro_batch * world_size
    if global_batch % at_once:
        raise ConfigError(
            f"train.global_batch is {global_batch}; it must be a multiple of train.micro_batch x processes = "
            f"{micro_batch} x {world_size} = {at_once}"
        )
    return global_batch // at_once


def permute(values: Uint64, *, sizes: Uint64, keys: Uint64) -> Uint64:
    """Image of each value under a keyed bijection of range(size): a Feistel network with cycle walking.

    values, sizes, keys: uint64 [n], value < size; the bijection is a function of (size, key) alone. The
    network works on the pairs (left, right) of a grid a x b >= size that is only slightly larger than size, so a
    walk out of the range is short. Adding modulo a or b (instead of xor on bits) keeps each round invertible.
    """
    a = np.maximum(np.ceil(np.sqrt(sizes)).astype(np.uint64), np.uint64(1))
    b = (sizes + a - np.uint64(1)) // a
    out = _feistel(values, a, b, keys)
    outside = np.flatnonzero(out >= sizes)
    while outside.size:
        out[outside] = _feistel(out[outside], a[outside], b[outside], keys[outside])
        outside = outside[out[outside] >= sizes[outside]]
    return out


def spread(count: int, total: int) -> NDArray[np.int64]:
    """The first `count` numbers, int64 [n], of a fixed permutation of range(total); all if `count` is larger."""
    n = min(count, total)
    sizes, keys = np.full(n, total, np.uint64), np.zeros(n, np.uint64)
    return permute(np.arange(n, dtype=np.uint64), sizes=sizes, keys=keys).astype(np.int64)


def _feistel(values: Uint64, a: Uint64, b: Uint64, keys: Uint64) -> Uint64:
    left, right = values // b, values % b
    for number in range(0, _ROUNDS, 2):
        left = (left + mix64_array(number, keys ^ mix64_array(number, right)) % a) % a
        right = (right + mix64_array(number + 1, keys ^ mix64_array(number + 1, left)) % b) % b
    return left * b + right


class _Stream:
    """Positions of one bucket in closed form: size of its first e epochs, and the example at each position."""

    def __init__(self, bucket: Bucket, *, global_batch: int, seed: int, number: int, remainder: str):
        self.bucket, self.global_batch = bucket, global_batch
        self.used = [n - n % global_batch if remainder == "drop" else n for n in bucket.counts]
        self.before = [0, *accumulate(self.used)]
        self.key = mix64(seed, _EXAMPLES, number)

    def fed(self, epochs: int) -> int:
        """Examples in the first `epochs` epochs."""
        cycles, rest = divmod(epochs, len(self.used))
        return cycles * self.before[-1] + self.before[rest]

    def batches(self, epochs: int) -> int:
        """Whole batches that the first `epochs` epochs fill."""
        return self.fed(epochs) // self.global_batch

    def batch(self, number: int) -> tuple[Uint64, NDArray[np.int64]]:
        """Example ids and epochs of the bucket's batch `number`; the epoch is per example."""
        start_cycle, start = divmod(number * self.global_batch, self.before[-1])
        positions = start + np.arange(self.global_batch, dtype=np.int64)
        cycles, rest = np.divmod(positions, self.before[-1])
        views = np.searchsorted(self.before, rest, side="right") - 1
        epochs = (start_cycle + cycles) * len(self.used) + views
        place = (rest - np.asarray(self.before)[views]).astype(np.uint64)
        sizes = np.asarray(self.bucket.counts, dtype=np.uint64)[views]
        keys = mix64_array(self.key, epochs.astype(np.uint64))
        first = np.asarray(self.bucket.first, dtype=np.uint64)[views]
        return first + permute(place, sizes=sizes, keys=keys), epochs


class EpochPlan:
    """`plan[step]` is the global batch of that step; O(1) memory, O(log step) time at any size."""

    def __init__(self, buckets: Sequence[Bucket], *, global_batch: int, seed: int, remainder: str = "carry"):
        self.buckets, self.global_batch = tuple(buckets), global_batch
        self.seed, self.remainder = seed, remainder
        if not any(sum(bucket.counts) for bucket in self.buckets):
            raise ConfigError("the cache has no example to train on; see `dropped` in its manifest.json")
        if remainder == "drop":
            self._refuse_small_buckets()
        self._streams = [
            _Stream(bucket, global_batch=global_batch, seed=seed, number=number, remainder=remainder)
            for number, bucket in enumerate(self.buckets)
        ]

    def _refuse_small_buckets(self) -> None:
        for bucket in self.buckets:
            for view, count in enumerate(bucket.counts):
                if 0 < count < self.global_batch:
                    raise ConfigError(
                        f"data.remainder is drop, but bucket {bucket.name} has only {count} examples in "
                        f"view {view}, fewer than train.global_batch {self.global_batch}: use "
                        "data.remainder=carry or a smaller batch"
                    )

    def dropped(self) -> dict[str, list[int]]:
        """Examples dropped in an epoch of each view, by bucket: all zero with `carry`."""
        return {
            stream.bucket.name: [n - used for n, used in zip(stream.bucket.counts, stream.used, strict=True)]
            for stream in self._streams
        }

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch; that of the next epoch if this one is too small to fill a batch."""
        return sum(stream.batches(epoch) for stream in self._streams)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to, by bisection on the closed-form sum of batches."""
        assert step >= 0
        high = 1
        while self.first_step(high) <= step:
            high *= 2
        low = high // 2  # first_step(low) <= step < first_step(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.first_step(middle) <= step else (low, middle)
        return low

    def progress(self, step: int) -> float:
        """Epochs done before `step`, with the fraction: shown in logs as `epoch`."""
        epoch = self.epoch_of(step)
        start, end = self.first_step(epoch), self.first_step(epoch + 1)
        return epoch + (step - start) / (end - start)

    def __getitem__(self, step: int) -> PlannedBatch:
        epoch = self.epoch_of(step)
        start, end = self.first_step(epoch), self.first_step(epoch + 1)
        key = np.array([mix64(self.seed, _BATCHES, epoch)], dtype=np.uint64)
        place, size = np.array([step - start], np.uint64), np.array([end - start], np.uint64)
        slot = int(permute(place, sizes=size, keys=key)[0])
        for number, stream in enumerate(self._streams):
            done = stream.batches(epoch)
            here = stream.batches(epoch + 1) - done
            if slot < here:
                example_ids, epochs = stream.batch(done + slot)
                return PlannedBatch(step=step, bucket=number, example_ids=example_ids, epochs=epochs)
            slot -= here
        raise AssertionError("the slots of an epoch are its buckets' batches")
