"""Laws of several caches in one run: exact shares at every step, separate epochs for each cache, one reader for all."""

import json
import shutil
from fractions import Fraction
from math import ceil, log2
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seals import rewrite
from trials import TRIALS

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read.batches import open_reader, plan_for
from flowmask.data_pipeline.read.epoch_plan import EpochPlan
from flowmask.data_pipeline.read.loader import Loader
from flowmask.data_pipeline.read.mixture import MixturePlan, MixtureReader, Turns
from flowmask.data_pipeline.read.reader import NEEDS, CacheReader
from flowmask.launch.config import validate
from flowmask.models.errors import CacheError, ConfigError

WEIGHTS = st.lists(st.integers(1, 10**6), min_size=1, max_size=9)
MASK = (1 << 64) - 1


def shares_of(weights):
    return [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]


def buckets_of(counts):
    """A cache's buckets of `counts[bucket][view]` examples; ids start at 0."""
    buckets, first = [], 0
    for number, views in enumerate(counts):
        firsts = tuple(first + sum(views[:v]) for v in range(len(views)))
        buckets.append(Bucket(f"b{number}", firsts, tuple(views)))
        first += sum(views)
    return buckets


def check_turns(weights, *, seed, start, steps):
    """Every step has one owner. The share of each cache in every prefix is off by less than the depth of the tree."""
    shares = shares_of(weights)
    turns, depth = Turns(shares, seed=seed), ceil(log2(len(shares)))
    given = turns.counts(start)
    assert sum(given) == start
    for step in range(start, start + steps):
        owner, number = turns.turn(step)
        assert number == given[owner], "the number of a step in its cache is how often that cache had its turn"
        given[owner] += 1
        for count, share in zip(given, shares, strict=True):
            assert abs(count - share * (step + 1)) < max(depth, 1)
    assert given == turns.counts(start + steps)


@settings(max_examples=40)
@given(weights=WEIGHTS, seed=st.integers(0, 2**64 - 1), start=st.integers(0, 10**12))
def test_every_cache_has_its_share_of_every_prefix_within_a_constant(weights, seed, start):
    check_turns(weights, seed=seed, start=start, steps=60)


@pytest.mark.long
@settings(max_examples=300 * TRIALS)
@given(
    weights=st.lists(st.floats(1e-6, 1e6).map(lambda w: Fraction(str(w))), min_size=1, max_size=40),
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 10**15),
)
def test_every_cache_has_its_share_of_every_prefix_at_length(weights, seed, start):
    check_turns(weights, seed=seed, start=start, steps=500)


def test_two_caches_in_the_ratio_of_two_to_one_take_turns_evenly():
    turns = Turns(shares_of([2, 1]), seed=0)
    owners = [turns.turn(step)[0] for step in range(300)]
    assert all(sorted(owners[i : i + 3]) == [0, 0, 1] for i in range(298)), "no run of one cache is longer"
    starts = {tuple(Turns(shares_of([2, 1]), seed=seed).turn(s)[0] for s in range(3)) for seed in range(40)}
    assert len(starts) == 3, "the seed says who begins"


CACHES = st.lists(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=2).map(
        lambda buckets: [views[: len(buckets[0])] + [1] * (len(buckets[0]) - len(views)) for views in buckets]
    ),
    min_size=1,
    max_size=4,
)


def check_streams(caches, weights, *, global_batch, seed, steps):
    """Each cache gives the batches of its own plan, none left out: its epochs and views are its own."""
    shares = shares_of((weights * len(caches))[: len(caches)])
    buckets = [buckets_of(cache) for cache in caches]
    plan = MixturePlan(buckets, shares=shares, global_batch=global_batch, seed=seed)
    first = np.cumsum([0] + [sum(map(sum, cache)) for cache in caches])
    first_bucket = np.cumsum([0] + [len(cache) for cache in caches])
    own = [EpochPlan(b, global_batch=global_batch, seed=p.seed) for b, p in zip(buckets, plan.plans, strict=True)]
    fed = [0] * len(caches)
    for step in range(steps):
        batch = plan[step]
        cache = int(np.searchsorted(first_bucket, batch.bucket, side="right")) - 1
        expected = own[cache][fed[cache]]
        fed[cache] += 1
        assert batch.step == step
        assert batch.bucket - first_bucket[cache] == expected.bucket
        assert np.array_equal(batch.epochs, expected.epochs)
        assert np.array_equal(batch.example_ids.astype(np.int64) - first[cache], expected.example_ids)
    progress = plan.progress_of_each(steps)
    assert progress == [alone.progress(count) for alone, count in zip(own, fed, strict=True)]
    assert len({p.seed for p in plan.plans}) == len(caches), "equal caches are not shuffled alike"


@settings(max_examples=15)
@given(
    caches=CACHES,
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    global_batch=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
)
def test_each_cache_is_fed_its_own_plan_without_a_gap(caches, weights, global_batch, seed):
    check_streams(caches, weights, global_batch=global_batch, seed=seed, steps=40)


@pytest.mark.long
@settings(max_examples=25 * TRIALS)
@given(
    caches=CACHES,
    weights=st.lists(st.integers(1, 99), min_size=1, max_size=4),
    global_batch=st.integers(1, 33),
    seed=st.integers(0, 2**64 - 1),
)
def test_each_cache_is_fed_its_own_plan_at_length(caches, weights, global_batch, seed):
    check_streams(caches, weights, global_batch=global_batch, seed=seed, steps=600)


def test_a_mixture_of_one_cache_is_that_caches_plan():
    buckets = buckets_of([[50, 40], [7, 90]])
    alone = EpochPlan(buckets, global_batch=8, seed=5)
    mixed = MixturePlan([buckets], shares=[Fraction(1)], global_batch=8, seed=5)
    for step in (*range(60), 10**9):
        one, other = alone[step], mixed[step]
        assert np.array_equal(one.example_ids, other.example_ids) and np.array_equal(one.epochs, other.epochs)
        assert (one.step, one.bucket) == (other.step, other.bucket)
        assert alone.progress(step) == mixed.progress(step)


def test_equal_caches_are_shuffled_apart():
    buckets = buckets_of([[1000]])
    plan = MixturePlan([buckets, buckets], shares=shares_of([1, 1]), global_batch=10, seed=1)
    orders = [[i for s in range(40) if plan[s].bucket == c for i in plan[s].example_ids % 1000] for c in (0, 1)]
    assert orders[0] != orders[1] and len(orders[0]) == len(orders[1]) == 200


@pytest.mark.parametrize("size", [10**4, 10**7, 10**10])
def test_a_mixture_of_any_size_is_planned_in_milliseconds_and_is_the_same_for_every_world(size):
    views = [[Bucket("a", (0, size), (size, size - 7))], [Bucket("b", (0,), (size // 3,))], buckets_of([[17]])]
    plan = MixturePlan(views, shares=shares_of([5, 2, "0.5"]), global_batch=1000, seed=1)
    started = perf_counter()
    for step in (0, 10**6, 10**9):
        batch = plan[step]
        pairs = set(zip(batch.example_ids.tolist(), batch.epochs.tolist(), strict=True))
        assert len(pairs) == 1000
        for world in (1, 2, 8, 40, 1000):  # the ranks' parts together are the global batch
            share = 1000 // world
            ranks = [batch.example_ids[r * share : (r + 1) * share] for r in range(world)]
            assert np.array_equal(np.concatenate(ranks), batch.example_ids)
        assert 0 <= plan.progress(step) == min(plan.progress_of_each(step))
    assert (perf_counter() - started) / 3 < 0.3


def test_drop_refuses_and_names_a_small_bucket_of_any_cache():
    with pytest.raises(ConfigError, match="b0 has only 3 examples in view 0"):
        MixturePlan(
            [buckets_of([[40]]), buckets_of([[3]])], shares=shares_of([1, 1]), global_batch=4, seed=0, remainder="drop"
        )


@pytest.fixture(scope="module")
def other_cache(make_config, tmp_path_factory) -> Path:
    """One view with other draws and without flips: other bytes, but the same for a model."""
    out = tmp_path_factory.mktemp("other") / "cache"
    build(make_config(out, clip={"flip_probability": 0.0}, cache={"views": 1, "seed": 9}))
    return out


def mixture(*entries, **rest) -> LoaderConfig:
    return LoaderConfig.model_validate({"mix": [{"cache": c, "weight": w} for c, w in entries], **rest})


def test_an_example_of_a_mixture_is_the_example_of_its_cache(cache, other_cache):
    reader = open_reader(mixture((cache, 2), (other_cache, 1)))
    assert isinstance(reader, MixtureReader)
    first = 0
    for alone in (CacheReader(cache), CacheReader(other_cache)):
        for example in range(alone.manifest.examples):
            mine = reader.read(np.array([first + example]), needs=NEEDS, text_tokens=256)
            theirs = alone.read(np.array([example]), needs=NEEDS, text_tokens=256)
            assert all(torch.equal(mine[name], theirs[name]) for name in NEEDS)
            assert reader.record(first + example) == alone.record(example)
            assert reader.bucket_of(first + example).name == alone.bucket_of(example).name
        first += alone.manifest.examples
        alone.close()
    assert reader.manifest.examples == first
    reader.close()


def run_of(reader, *, world, steps, micro_batch=1, start=0, global_batch=8):
    """Digest of each global step, with the ids and keys of all ranks together."""
    plan = plan_for(reader, global_batch=global_batch, seed=3, remainder="carry")
    given = [[0, [], []] for _ in range(steps)]
    for rank in range(world):
        loader = Loader(
            reader,
            plan,
            rank=rank,
            world_size=world,
            micro_batch=micro_batch,
            needs={"mask_mean"},
            text_tokens=256,
            threads=rank % 3,
            start_step=start,
        )
        with loader:
            for place in range(steps):
                for batch in next(loader):
                    given[place][0] = given[place][0] + batch.digest & MASK
                    given[place][1] += batch.example_ids.tolist()
                    given[place][2] += batch.keys
    return given


def test_the_loader_reads_a_mixture_alike_for_any_world_and_goes_on_at_any_step(cache, other_cache):
    reader = open_reader(mixture((cache, 2), (other_cache, 1)))
    whole = run_of(reader, world=1, steps=9)
    for world, micro_batch in ((2, 2), (8, 1)):
        assert run_of(reader, world=world, steps=9, micro_batch=micro_batch) == whole
    assert run_of(reader, world=2, steps=4, start=5) == whole[5:]
    edge = CacheReader(cache).manifest.examples
    owners = [{example >= edge for example in ids} for _, ids, _ in whole]
    assert all(len(owner) == 1 for owner in owners), "a global batch is of one cache"
    assert sum(owner == {True} for owner in owners) == 3
    keys = [key for _, _, step in whole for key in step]
    assert len(set(keys)) == len(keys)
    reader.close()


def test_one_cache_in_a_mixture_is_read_as_that_cache(cache):
    mixed, alone = open_reader(mixture((cache, 7))), open_reader(LoaderConfig(cache=cache))
    assert run_of(mixed, world=1, steps=6) == run_of(alone, world=1, steps=6)
    mixed.close(), alone.close()


def test_the_fingerprint_covers_every_cache_and_weight_but_not_places(cache, other_cache, tmp_path):
    def prints(*entries):
        with_reader = open_reader(mixture(*entries))
        with_reader.close()
        return with_reader.manifest.fingerprint

    base = prints((cache, 2), (other_cache, 1))
    moved = shutil.copytree(cache, tmp_path / "moved")
    assert prints((moved, 4), (other_cache, 2)) == base
    assert base.fields["mix.0.share"] == "2/3" and base.fields["clip.frames"] == 5
    assert (base.fields["mix.0.cache.views"], base.fields["mix.1.cache.views"]) == (2, 1)
    other = prints((cache, 3), (other_cache, 1))
    assert other.total != base.total and other.text == base.text
    assert prints((other_cache, 1), (cache, 2)).total != base.total


def spoil(folder: Path, **changes) -> Path:
    def change(manifest):
        manifest.update(changes)
        manifest["fingerprint"]["total"] = "0" * 64

    rewrite(folder / "manifest.json", change)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pixel_norm": "imagenet"}, "pixel_norm: half there, imagenet here;"),
        ({"lowercase": False}, "lowercase: True there, False here;"),
        ({"dtype": "float32"}, "dtype: bfloat16 there, float32 here;"),
        ({"text_dim": 7}, "text_dim: 16 there, 7 here;|text_dim: .* there, 7 here;"),
        (
            {"latent_channels": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
            "latent_channels: 16 .*; latents_mean: .*",
        ),
        ({}, None),
    ],
)
def test_caches_of_which_no_one_model_can_be_trained_are_refused_with_the_fields(cache, tmp_path, changes, said):
    other = spoil(shutil.copytree(cache, tmp_path / "other"), **changes)
    if said is None:  # the same for a model: only the hash differs, as for another dataset
        open_reader(mixture((cache, 1), (other, 1))).close()
        return
    with pytest.raises(CacheError, match=said) as raised:
        open_reader(mixture((cache, 1), (other, 1)))
    assert "\n" not in str(raised.value) and str(other) in str(raised.value) and str(cache) in str(raised.value)


def test_weights_of_another_vae_are_refused_by_field(cache, tmp_path):
    other = shutil.copytree(cache, tmp_path / "other")
    fields = json.loads((other / "manifest.json").read_text())["fingerprint"]
    fields["fields"]["model.vae"] = "f" * 64
    spoil(other, fingerprint=fields)
    with pytest.raises(CacheError, match=r"model\.vae: \w+\.\.\. there, f+\.\.\. here"):
        open_reader(mixture((cache, 1), (other, 1)))


def test_the_same_cache_twice_is_refused(cache, tmp_path):
    with pytest.raises(CacheError, match="holds the same cache as"):
        open_reader(mixture((cache, 1), (shutil.copytree(cache, tmp_path / "copy"), 1)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, r"key data\.cache is missing; set it, or data\.mix"),
        ({"mix": []}, r"key data\.cache is missing"),
        ({"cache": "a", "mix": [{"cache": "b"}]}, r"data\.cache and data\.mix are both given"),
        ({"mix": [{"cache": "a", "weight": 0}]}, r"data\.mix\.0\.weight is 0: input should be greater than 0"),
        ({"mix": [{"cache": "a", "weight": float("inf")}]}, r"data\.mix\.0\.weight is inf"),
        ({"mix": [{"weight": 1}]}, r"key data\.mix\.0\.cache is missing"),
        ({"mix": [{"cache": "a", "wait": 1}]}, r"unknown key data\.mix\.0\.wait"),
    ],
)
def test_a_mixture_that_cannot_be_is_one_line_with_the_key(data, said):
    from flowmask.launch.jobs import TrainJob

    job = {"out": "o", "model": {"wan": "w"}, "data": data, "train": {"steps": 1, "global_batch": 1}}
    with pytest.raises(ConfigError, match=said) as raised:
        validate(job, TrainJob, origin="c.yaml")
    assert "\n" not in str(raised.value)
