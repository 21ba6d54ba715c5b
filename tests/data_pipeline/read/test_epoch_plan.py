"""Laws of the global order: every example exactly once, for any number of readers."""

from collections import Counter
from itertools import pairwise
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trials import TRIALS

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.read.epoch_plan import EpochPlan, permute
from flowmask.models.errors import ConfigError

COUNTS = st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2), min_size=1, max_size=4).filter(
    lambda counts: any(map(any, counts))
)


def buckets_of(counts: list[list[int]]) -> list[Bucket]:
    buckets, first = [], 0
    for number, views in enumerate(counts):
        firsts = tuple(first + sum(views[:v]) for v in range(len(views)))
        buckets.append(Bucket(f"bucket{number}", firsts, tuple(views)))
        first += sum(views)
    return buckets


def permutation(size: int, key: int) -> np.ndarray:
    values = np.arange(size, dtype=np.uint64)
    return permute(values, sizes=np.full(size, size, np.uint64), keys=np.full(size, key, np.uint64))


@pytest.mark.parametrize("size", [*range(1, 40), 1000, 4096, 65537])
def test_permute_is_a_bijection_of_every_size(size):
    for key in (0, 1, 2**63 + 5):
        assert np.array_equal(np.sort(permutation(size, key)), np.arange(size))


def test_every_order_of_four_comes_about_equally_often():
    seen = Counter(tuple(permutation(4, key).tolist()) for key in range(4800))
    assert len(seen) == 24
    assert min(seen.values()) > 130 and max(seen.values()) < 275  # 200 expected, standard deviation 14


def test_neighbouring_epochs_are_in_unrelated_orders():
    first, second = (permutation(4096, key).astype(float) for key in (7, 8))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.06
    assert abs(np.corrcoef(first, np.arange(4096))[0, 1]) < 0.06


def check_epochs(counts, *, global_batch, seed, epochs=5):
    """Read whole epochs and compare the examples of each with the expected ones."""
    plan = EpochPlan(buckets_of(counts), global_batch=global_batch, seed=seed)
    fed: dict[int, Counter[int]] = {}
    step = 0
    while plan.epoch_of(step) <= epochs:
        batch = plan[step]
        bucket = plan.buckets[batch.bucket]
        assert len(batch.example_ids) == global_batch
        for example, epoch in zip(batch.example_ids.tolist(), batch.epochs.tolist()):
            view = epoch % len(bucket.counts)
            assert bucket.first[view] <= example < bucket.first[view] + bucket.counts[view]
            fed.setdefault(epoch, Counter())[example] += 1
        step += 1
    for epoch in range(epochs):
        missing = sum(views[epoch % 2] for views in counts) - sum(fed.get(epoch, Counter()).values())
        assert missing < global_batch * len(counts), "only what the last batches carry over may be missing"
        assert set(fed.get(epoch, Counter()).values()) <= {1}
    for number, views in enumerate(counts):  # each bucket's epochs came without a gap
        bucket = plan.buckets[number]
        of_bucket = {
            epoch: [i for i in examples if bucket.first[0] <= i < bucket.first[0] + sum(views)]
            for epoch, examples in fed.items()
        }
        last = max((epoch for epoch, examples in of_bucket.items() if examples), default=0)
        for epoch in range(last):
            assert len(of_bucket.get(epoch, [])) == views[epoch % 2]


@settings(max_examples=30)
@given(counts=COUNTS, global_batch=st.integers(1, 17), seed=st.integers(0, 2**64 - 1))
def test_every_example_stands_exactly_once_in_each_epoch_of_its_view(counts, global_batch, seed):
    check_epochs(counts, global_batch=global_batch, seed=seed)


@pytest.mark.long
@settings(max_examples=300 * TRIALS)
@given(counts=COUNTS, global_batch=st.integers(1, 64), seed=st.integers(0, 2**64 - 1))
def test_every_example_stands_exactly_once_in_each_epoch_at_length(counts, global_batch, seed):
    check_epochs(counts, global_batch=global_batch, seed=seed, epochs=11)


def test_a_batch_may_straddle_epochs_and_each_example_keeps_its_own_epoch_and_view():
    plan = EpochPlan([Bucket("a", (0, 5), (5, 3))], global_batch=6, seed=3)
    batches = [plan[step] for step in range(4)]  # 24 examples are three passes over both views
    epochs = sorted(int(epoch) for batch in batches for epoch in batch.epochs)
    assert epochs == [0] * 5 + [1] * 3 + [2] * 5 + [3] * 3 + [4] * 5 + [5] * 3
    assert any(len(set(batch.epochs.tolist())) > 1 for batch in batches)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    buckets = buckets_of([[50, 40], [7, 90]])
    forwards = EpochPlan(buckets, global_batch=8, seed=5)
    ahead = [forwards[step].example_ids.tolist() for step in range(60)]
    backwards = EpochPlan(buckets, global_batch=8, seed=5)
    assert [backwards[step].example_ids.tolist() for step in reversed(range(60))] == ahead[::-1]
    other = EpochPlan(buckets, global_batch=8, seed=6)
    assert [other[step].example_ids.tolist() for step in range(60)] != ahead


def test_buckets_are_interleaved_within_an_epoch():
    plan = EpochPlan(buckets_of([[400], [400]]), global_batch=4, seed=0)
    order = [plan[step].bucket for step in range(200)]
    assert order.count(0) == 100
    assert 60 < sum(a != b for a, b in pairwise(order)) < 140


def test_drop_says_what_it_loses_and_feeds_nothing_twice():
    plan = EpochPlan(buckets_of([[10, 9], [23, 8]]), global_batch=4, seed=1, remainder="drop")
    assert plan.dropped() == {"bucket0": [2, 1], "bucket1": [3, 0]}
    assert [plan.first_step(epoch) for epoch in range(4)] == [0, 7, 11, 18]
    for epoch in range(4):
        steps = range(plan.first_step(epoch), plan.first_step(epoch + 1))
        examples = [i for step in steps for i in plan[step].example_ids.tolist()]
        assert len(set(examples)) == len(examples)
        assert all(set(plan[step].epochs.tolist()) == {epoch} for step in steps)


def test_drop_refuses_a_bucket_smaller_than_a_batch_by_name():
    with pytest.raises(ConfigError, match="bucket1 has only 3 examples in view 0"):
        EpochPlan(buckets_of([[10], [3]]), global_batch=4, seed=1, remainder="drop")


def test_an_empty_cache_is_refused():
    with pytest.raises(ConfigError, match="no example"):
        EpochPlan(buckets_of([[0, 0]]), global_batch=4, seed=1)


def test_ten_thousand_million_examples_are_planned_in_milliseconds():
    plan = EpochPlan([Bucket("a", (0, 10**10), (10**10, 10**10 - 7))], global_batch=256, seed=1)
    started = perf_counter()
    for step in (0, 10**6, 10**9, 10**12):
        batch = plan[step]
        assert len(set(batch.example_ids.tolist())) == 256
    assert (perf_counter() - started) / 4 < 0.1
    assert plan.epoch_of(plan.first_step(12345)) == 12345


def test_progress_runs_from_epoch_to_epoch():
    plan = EpochPlan(buckets_of([[40]]), global_batch=4, seed=1)
    assert [plan.progress(step) for step in (0, 5, 10, 25)] == [0.0, 0.5, 1.0, 2.5]
