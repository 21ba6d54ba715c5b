"""Several caches in one training run: each provides global batches in proportion to its weight.

Every cache has a separate plan, so epochs and views are separate, and equal shapes of two caches are two
streams. The cache of a step is computed, without state, in O(log caches). Example ids are numbered through the
caches in their order. Refuses caches that one model cannot be trained on, naming the fields.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.cache.manifest import RARE, BucketEntry, Fingerprint, Manifest
from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.read.epoch_plan import EpochPlan, PlannedBatch
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.models.errors import CacheError
from flowmask.models.stored.sealed import to_json

_CACHES, _TURNS = 3, 4  # families of keys, in addition to the two of epoch_plan
_SAME = ("dtype", "latent_channels", "latents_mean", "latents_std", "text_dim", "pixel_norm", "lowercase")
_SAME_FIELDS = ("format", "model.vae", "model.text_encoder", "model.tokenizer", "text.limits")


class Turns:
    """Assigns every step to one cache, so that after n steps each has had n x share[c] of them, within a constant.

    A tree halves the caches; a node gives its left side floor(n x share + offset) of its first n steps, in
    exact fractions. So a cache at depth d deviates by less than d steps at every n, and every cache gets its steps.
    """

    def __init__(self, shares: Sequence[Fraction], *, seed: int):
        self._before = [Fraction(0), *accumulate(shares)]
        self._caches, self._seed = len(shares), seed

    def turn(self, step: int) -> tuple[int, int]:
        """The cache that a step belongs to, and the number of its earlier steps."""
        low, high = 0, self._caches
        while high - low > 1:
            middle = (low + high) // 2
            left = self._left(low, high, step)
            if self._left(low, high, step + 1) > left:
                high, step = middle, left
            else:
                low, step = middle, step - left
        return low, step

    def counts(self, steps: int) -> list[int]:
        """Number of steps of each cache among the first `steps` steps."""
        return self._counts(0, self._caches, steps)

    def _counts(self, low: int, high: int, steps: int) -> list[int]:
        if high - low == 1:
            return [steps]
        middle, left = (low + high) // 2, self._left(low, high, steps)
        return [*self._counts(low, middle, left), *self._counts(middle, high, steps - left)]

    def _left(self, low: int, high: int, steps: int) -> int:
        """Number of a node's first steps in its left half: a Beatty sequence with an offset in [0, 1)."""
        middle = (low + high) // 2
        share = (self._before[middle] - self._before[low]) / (self._before[high] - self._before[low])
        offset = Fraction(mix64(self._seed, _TURNS, low, high), 1 << 64)
        return int(steps * share + offset)


class MixturePlan:
    """The plans of several caches as one; `plan[step]` is as `EpochPlan`'s, with ids and buckets of all."""

    def __init__(
        self,
        caches: Sequence[Sequence[Bucket]],
        *,
        shares: Sequence[Fraction],
        global_batch: int,
        seed: int,
        remainder: str = "carry",
    ):
        """caches: the buckets of each cache, its ids from 0; shares: of the steps, positive, with the sum 1."""
        self.global_batch, self.seed, self.remainder = global_batch, seed, remainder
        self._turns = Turns(shares, seed=seed)
        # Equal caches must be shuffled differently; a single cache is shuffled as without a mixture.
        seeds = [mix64(seed, _CACHES, c) if len(caches) > 1 else seed for c in range(len(caches))]
        self.plans = [
            EpochPlan(buckets, global_batch=global_batch, seed=own, remainder=remainder)
            for buckets, own in zip(caches, seeds, strict=True)
        ]
        self._first_id = [0, *accumulate(sum(sum(b.counts) for b in buckets) for buckets in caches)]
        self._first_bucket = [0, *accumulate(len(buckets) for buckets in caches)]

    def __getitem__(self, step: int) -> PlannedBatch:
        cache, number = self._turns.turn(step)
        batch = self.plans[cache][number]
        ids = batch.example_ids + np.uint64(self._first_id[cache])
        return replace(batch, step=step, bucket=self._first_bucket[cache] + batch.bucket, example_ids=ids)

    def dropped(self) -> dict[str, list[int]]:
        """Examples lost in an epoch of each view, by bucket: all zero with `carry`."""
        return {name: counts for plan in self.plans for name, counts in plan.dropped().items()}

    def progress(self, step: int) -> float:
        """Epochs done before `step` of the cache that has done the fewest."""
        return min(self.progress_of_each(step))

    def progress_of_each(self, step: int) -> list[float]:
        """Epochs done before `step`, cache by cache."""
        return [plan.progress(count) for plan, count in zip(self.plans, self._turns.counts(step), strict=True)]


class MixtureReader:
    """Several caches, read as one: cache c's example i is example `first_id[c] + i`."""

    def __init__(self, caches: Sequence[CacheReader], *, shares: Sequence[Fraction]):
        """Raises CacheError if the caches can't train one model, or if one is listed twice."""
        self.caches, self.shares = list(caches), list(shares)
        self.waits = any(cache.waits for cache in caches)
        _refuse_unlike(self.caches)
        self._first_id = [0, *accumulate(cache.manifest.examples for cache in self.caches)]
        self.manifest = _manifest(self.caches, self.shares, first_id=self._first_id)
        self.buckets: list[Bucket] = [bucket.counts() for bucket in self.manifest.buckets]

    def _own(self, example_id: int) -> tuple[CacheReader, int]:
        """The cache of an example, and the example's id there."""
        assert 0 <= example_id < self._first_id[-1], f"no example {example_id}"
        place = bisect_right(self._first_id, example_id) - 1
        return self.caches[place], example_id - self._first_id[place]

    def check_text_tokens(self, text_tokens: int) -> None:
        """ConfigError if some cache has a sentence that is stored neither whole nor cut to this length."""
        for cache in self.caches:
            cache.check_text_tokens(text_tokens)

    def bucket_of(self, example_id: int) -> BucketEntry:
        """The bucket of an example, in its own cache."""
        cache, own = self._own(example_id)
        return cache.bucket_of(own)

    def read(self, example_ids: NDArray[np.integer], *, needs: Collection[str], text_tokens: int) -> dict[str, Tensor]:
        """Tensors [b ...] of examples [b] of one bucket of one cache, as from `CacheReader.read`."""
        cache, first = self._own(int(example_ids[0]))
        own = example_ids.astype(np.int64) - int(example_ids[0]) + first
        assert ((own >= 0) & (own < cache.manifest.examples)).all(), "a batch is of one cache"
        return cache.read(own, needs=needs, text_tokens=text_tokens)

    def record(self, example_id: int) -> dict[str, Any]:
        """The record's JSON of the example's clip."""
        cache, own = self._own(example_id)
        return cache.record(own)

    def sentence(self, example_id: int) -> str:
        """The sentence that names the example's objects."""
        cache, own = self._own(example_id)
        return cache.sentence(own)

    def close(self) -> None:
        for cache in self.caches:
            cache.close()


IndexedReader = CacheReader | MixtureReader
IndexedPlan = EpochPlan | MixturePlan


def _refuse_unlike(caches: Sequence[CacheReader]) -> None:
    seen: dict[str, Path | str] = {}
    for cache in caches:
        differing = [
            f"{name}: {_short(theirs)} there, {_short(ours)} here"
            for (name, theirs), ours in zip(_needed(caches[0]).items(), _needed(cache).values(), strict=True)
            if theirs != ours
        ]
        if differing:
            raise CacheError(
                f"data.mix: one model cannot be trained on {caches[0].place} (there) and {cache.place} (here): "
                f"{'; '.join(differing)}; build one of them again with the settings of the other"
            )
        total = cache.manifest.fingerprint.total
        if total in seen:
            raise CacheError(
                f"data.mix: {cache.place} holds the same cache as {seen[total]}; name it once, with the sum "
                "of the weights"
            )
        seen[total] = cache.place


def _needed(cache: CacheReader) -> dict[str, Any]:
    """The settings of a cache that weights depend on."""
    fields = cache.manifest.fingerprint.fields
    facts = {name: getattr(cache.manifest, name) for name in _SAME}
    return facts | {name: fields.get(name) for name in _SAME_FIELDS}


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:40]}..." if len(text) > 43 else text


def _manifest(caches: Sequence[CacheReader], shares: Sequence[Fraction], *, first_id: Sequence[int]) -> Manifest:
    """One manifest for all caches: shared fields, sums of the others, no shards."""
    each = [cache.manifest for cache in caches]
    buckets = [
        bucket.model_copy(update={"first": [first + i for i in bucket.first]})
        for manifest, first in zip(each, first_id, strict=False)
        for bucket in manifest.buckets
    ]
    return each[0].model_copy(
        update={
            "fingerprint": _fingerprint([manifest.fingerprint for manifest in each], shares),
            "views": max(manifest.views for manifest in each),
            "longest_text_tokens": max(manifest.longest_text_tokens for manifest in each),
            "clips": sum(manifest.clips for manifest in each),
            "examples": sum(manifest.examples for manifest in each),
            **{
                name: sum(getattr(manifest, name) for manifest in each)
                for name in ("dropped_empty_masks", *sorted(RARE))
            },
            "buckets": buckets,
            "environments": [],
            "shards": [],
        }
    )


def _fingerprint(each: Sequence[Fingerprint], shares: Sequence[Fraction]) -> Fingerprint:
    """Fields that all caches share keep their names; the others, and the shares, get names with their position."""
    common = {
        name: value
        for name, value in each[0].fields.items()
        if all(name in other.fields and other.fields[name] == value for other in each)
    }
    fields = dict(common)
    for place, (one, share) in enumerate(zip(each, shares, strict=True)):
        own = {name: value for name, value in one.fields.items() if name not in common}
        fields |= {f"mix.{place}.{name}": value for name, value in {"share": str(share), **own}.items()}
    parts = {part: _hash([getattr(one, part) for one in each]) for part in ("total", "text", "video", "masks")}
    parts["total"] = _hash([parts["total"], *map(str, shares)])
    return Fingerprint(**parts, fields=fields)


def _hash(values: Sequence[str]) -> str:
    return hashlib.sha256(to_json(list(values))).hexdigest()
