"""The settings that a resume may change, and those that it may not."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import run_config

from flowmask.launch.jobs import TrainJob
from flowmask.models.errors import CheckpointError
from flowmask.trainer.config import RunConfig
from flowmask.trainer.state.resume import _free_keys, refuse_other_config, settled


def saved_by(config: RunConfig) -> dict[str, Any]:
    """The state in a checkpoint of a first start with this config."""
    tree: dict[str, Any] = json.loads(settled(config, {}).model_dump_json())
    return {"config": tree}


def test_only_what_shapes_no_training_may_change_on_a_resume(tmp_path: Path) -> None:
    state = saved_by(run_config(tmp_path, tmp_path / "a"))
    free = {
        "launch": {"processes_per_node": 2},
        "train.steps": 20,
        "train.micro_batch": 1,
        "train.zero_stage": 3,
        "train.activation_checkpointing": "full",
        "data.cache": "moved",
        "data.threads": 0,
        "data.prefetch_batches": 9,
        "checkpoint.every_steps": 7,
        "tracking.uri": "sqlite:///x",
    }
    refuse_other_config(run_config(tmp_path, tmp_path / "b", free), state)
    changed = run_config(tmp_path, tmp_path / "b", free | {"train.lr": 0.2, "data.remainder": "drop"})
    with pytest.raises(CheckpointError, match=r"data\.remainder: carry -> drop; train\.lr: 0\.002 -> 0\.2\. Give"):
        refuse_other_config(changed, state)


def test_what_may_change_is_what_always_could() -> None:
    assert _free_keys() == {
        *("out", "launch", "checkpoint", "tracking", "guard", "evaluate"),
        *("data.cache", "data.mix", "data.threads", "data.prefetch_batches", "data.retries"),
        *("data.local_cache", "data.local_cache_gib"),
        *("train.epochs", "train.decay_at_epochs"),  # never saved: a run stores the resulting steps
        *("train.steps", "train.micro_batch", "train.sequence_parallel", "train.zero_stage", "train.offload_optimizer"),
        *("train.activation_checkpointing", "train.log_every_steps", "train.collective_timeout_s"),
    }


def test_a_job_is_judged_as_its_run_is(tmp_path: Path) -> None:
    config = run_config(tmp_path, tmp_path / "run")
    job = TrainJob.model_validate(config.model_dump() | {"launch": {"processes_per_node": 2}})
    refuse_other_config(job, saved_by(config))
    assert RunConfig.model_validate(job.model_dump(mode="json")).model_dump(mode="json") == job.model_dump(mode="json")


def test_a_key_that_is_newer_than_a_run_is_no_difference_unless_it_is_used(tmp_path: Path) -> None:
    now = run_config(tmp_path, tmp_path / "run")
    state = saved_by(now)
    del state["config"]["train"]["compile"], state["config"]["lora"], state["config"]["evaluate"]
    refuse_other_config(now, state)
    with pytest.raises(CheckpointError, match=r"train\.compile: False -> True"):
        refuse_other_config(run_config(tmp_path, tmp_path / "run", {"train.compile": True}), state)
    state["config"]["train"]["a_key_of_long_ago"] = 1
    with pytest.raises(CheckpointError, match="a_key_of_long_ago"):
        refuse_other_config(now, state)
