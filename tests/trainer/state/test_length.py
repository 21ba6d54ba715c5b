"""A run of N epochs is the run of that many steps in its cache, counted by the loader and fixed once."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import losses, run_config, start, unequal_tensors
from trials import TRIALS

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read.epoch_plan import EpochPlan
from flowmask.data_pipeline.read.stream import StreamReader
from flowmask.models.errors import CheckpointError, ConfigError
from flowmask.trainer.state.length import counted, if_known
from flowmask.trainer.train_config import TrainConfig


@settings(max_examples=60 * TRIALS)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    views=st.integers(1, 3),
    batch=st.integers(1, 17),
    epochs=st.integers(1, 4),
    remainder=st.sampled_from(["carry", "drop"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_epochs_give_every_example_as_often_as_they_name_its_view_but_for_a_batch_that_is_not_full(
    counts: list[int], views: int, batch: int, epochs: int, remainder: str, seed: int
) -> None:
    """Carry: less than a batch of each bucket waits for the next epoch. Drop: each epoch loses as much."""
    counts = [n for n in counts if n and (remainder == "carry" or n >= batch)]
    firsts = [tuple(range(1000 * i, 1000 * i + 100 * views, 100)) for i in range(len(counts))]
    buckets = [Bucket(f"b{i}", firsts[i], (n,) * views) for i, n in enumerate(counts)]
    whole = sum(n * epochs // batch if remainder == "carry" else n // batch * epochs for n in counts)
    train = TrainConfig(epochs=epochs, global_batch=batch)
    if not counts:
        return
    plan = EpochPlan(buckets, global_batch=batch, seed=seed, remainder=remainder)
    if not whole:
        with pytest.raises(
            ConfigError, match=f"train.epochs is {epochs}, .* train.global_batch of {batch}; set more epochs"
        ):
            counted(train, plan)
        return
    steps = counted(train, plan).last_step
    assert steps == whole
    seen: Counter[int] = Counter()
    for step in range(steps):
        seen.update(plan[step].example_ids.tolist())
    for bucket, n in zip(buckets, counts, strict=True):
        missing = 0
        for view, first in enumerate(bucket.first):
            wanted = len(range(view, epochs, views))
            assert all(seen[example] <= wanted for example in range(first, first + n))
            missing += sum(wanted - seen[example] for example in range(first, first + n))
        assert missing == (n * epochs % batch if remainder == "carry" else n % batch * epochs)


def test_epochs_of_a_stream_are_as_many_examples_but_for_a_batch_that_is_not_full(lab: Path) -> None:
    reader = StreamReader(LoaderConfig(cache=lab / "cache", mode="stream"))
    for batch in (1, 3, 4, 5, 16):
        plan = reader.plan(global_batch=batch, seed=0)
        for epochs in range(1, 8):
            if epochs * 8 >= batch:
                steps = counted(TrainConfig(epochs=epochs, global_batch=batch), plan).last_step
                assert plan.progress(steps) <= epochs < plan.progress(steps + 1)


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_a_run_of_epochs_is_the_run_of_their_steps_to_the_bit_also_when_there_are_more_of_them_later(
    lab: Path, tmp_path: Path, mode: str
) -> None:
    common = {"train.schedule": "multistep", "train.decay_factor": 0.5, "data.mode": mode}
    epochs = common | {"train.steps": None, "train.epochs": 2, "train.decay_at_epochs": [1]}  # two steps each
    assert start(lab, tmp_path / "epochs", epochs) == 0
    saved = yaml.safe_load((tmp_path / "epochs" / "config.yaml").read_text())["train"]
    assert (saved["steps"], saved["epochs"], saved["decay_at_steps"], saved["decay_at_epochs"]) == (4, None, [2], [])
    assert "train.epochs 2 of " in (tmp_path / "epochs" / "log.txt").read_text()
    assert start(lab, tmp_path / "epochs", epochs | {"train.epochs": 3}) == 0
    steps = common | {"train.steps": 6, "train.decay_at_steps": [2]}
    assert start(lab, tmp_path / "steps", steps) == 0
    assert losses(tmp_path / "epochs") == losses(tmp_path / "steps")
    assert not unequal_tensors(tmp_path / "epochs", tmp_path / "steps")
    assert start(lab, tmp_path / "epochs", steps) == 0  # the same run, asked for in steps
    with pytest.raises(CheckpointError, match=r"train\.decay_at_steps\.? ?.*\[2\] -> \[4\]"):
        start(lab, tmp_path / "epochs", epochs | {"train.decay_at_epochs": [2]})


def test_what_the_schedule_can_not_be_is_said_once_the_steps_are_known(lab: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"train.steps": None, "train.epochs": 2, "train.schedule": "cosine"}
    with pytest.raises(ConfigError, match=r"as steps of this cache \(4 in all\) train.warmup_steps is 4; it must"):
        start(lab, tmp_path / "run", asked | {"train.warmup_steps": 4})


def test_before_the_cache_is_there_epochs_stay_epochs(lab: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"train.steps": None, "train.epochs": 2}
    for cache in (tmp_path / "gone", "pipe:false", "http://127.0.0.1:9/cache"):
        mode = "stream" if isinstance(cache, str) else "indexed"
        config = run_config(lab, tmp_path, asked | {"data.cache": cache, "data.mode": mode})
        assert if_known(config) == config
    assert if_known(run_config(lab, tmp_path, asked)).train.last_step == 4
