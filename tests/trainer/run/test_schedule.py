"""The learning rate is a function of the step alone."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from runs import rows, run_config, start

from flowmask.launch.check.preflight import examine
from flowmask.launch.dispatch import describe
from flowmask.launch.jobs import TrainJob
from flowmask.models.errors import CheckpointError
from flowmask.trainer.run.schedule import behind_the_end, learning_rate
from flowmask.trainer.train_config import TrainConfig


def rates(count: int, **train: Any) -> list[float]:
    config = TrainConfig(steps=20, global_batch=1, lr=1.0, **train)
    return [learning_rate(step, config) for step in range(count)]


def test_constant_stays() -> None:
    assert rates(30) == [1.0] * 30


def test_warm_up_rises_evenly_and_ends_at_the_full_rate() -> None:
    assert rates(6, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_full_rate_to_its_floor_and_stays_there() -> None:
    found = rates(40, schedule="cosine", warmup_steps=4, final_lr_fraction=0.1)
    assert found[4] == 1.0 and found[12] == pytest.approx(0.55)
    assert all(later < earlier for earlier, later in itertools.pairwise(found[4:21]))
    assert found[20:] == [pytest.approx(0.1)] * 20
    assert found[8] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_multistep_drops_at_each_named_step() -> None:
    found = rates(8, schedule="multistep", decay_at_steps=[3, 6], decay_factor=0.5)
    assert found == [1.0] * 3 + [0.5] * 3 + [0.25] * 2


def test_more_steps_bend_no_schedule_whose_length_is_fixed() -> None:
    short = TrainConfig(steps=20, global_batch=1, schedule="cosine", schedule_steps=20)
    long = short.model_copy(update={"steps": 50})
    assert [learning_rate(s, short) for s in range(50)] == [learning_rate(s, long) for s in range(50)]


@pytest.mark.parametrize("step", [0, 5, 20, 25])
@pytest.mark.parametrize("steps", [10, 20, 21, 40])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("schedule", ["constant", "multistep", "cosine"])
def test_steps_behind_the_end_of_a_schedule_are_told_with_their_rate_and_the_ways_on(
    schedule: str, floor: float, steps: int, step: int
) -> None:
    keys = {"schedule": schedule, "schedule_steps": 20, "decay_at_steps": [3], "final_lr_fraction": floor}
    train = TrainConfig.model_validate({"steps": steps, "global_batch": 1, "lr": 0.5, **keys})
    said = behind_the_end(train, step=step, out=Path("RUN"))
    late = [s for s in range(step, steps) if s >= 20]
    assert (said is not None) == (schedule == "cosine" and floor < 1 and bool(late))
    if said is not None:
        assert f"steps {late[0] + 1} to {steps} " in said and "\n" not in said
        assert f"rate {learning_rate(late[0], train):g}" in said
        ways = ["out=NEW train.steps=40", f"train.steps={steps - step} model.init=RUN"]
        assert all(way in said for way in (ways if step and steps == 40 else [f"={steps}"]))


def test_both_ways_on_are_open_and_a_resume_names_them(lab: Path, tmp_path: Path) -> None:
    cosine, run = {"train.schedule": "cosine", "train.steps": 2}, tmp_path / "run"
    start(lab, run, cosine)
    start(lab, run, cosine | {"train.steps": 4})
    assert "steps 3 to 4 are after the end of the cosine of 2 steps: learning rate 0;" in (run / "log.txt").read_text()
    with pytest.raises(CheckpointError, match=f"schedule_steps: 2 -> 6.* another out .model.init={run} starts from"):
        start(lab, run, cosine | {"train.schedule_steps": 6, "train.steps": 6})
    start(lab, tmp_path / "longer", cosine | {"train.steps": 4})
    start(lab, tmp_path / "next", cosine | {"model.init": str(run)})
    for new in ("longer", "next"):
        assert all(row["lr"] > 0 for row in rows(tmp_path / new))
        assert "are after" not in (tmp_path / new / "log.txt").read_text()


def test_a_job_that_is_only_sent_is_warned_too(lab: Path, tmp_path: Path) -> None:
    long = {"train.schedule": "cosine", "train.schedule_steps": 5, "train.steps": 8}
    job = TrainJob.model_validate(run_config(lab, tmp_path / "run", long).model_dump(mode="json") | {"launch": {}})
    (found,) = (finding for finding in examine(job) if finding.what == "schedule")
    assert found.state == "warn" and "steps 6 to 8 are after" in found.said
    assert f"# take note:\n#   {found.said}" in describe(job, because="a test")
