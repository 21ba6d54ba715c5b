"""A resumed run equals one that never stopped: real ranks, killed with -9 at a random step, at every ZeRO stage."""

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from runs import kill_group, losses, rows, run_group, start_group
from trials import SEED, TRIALS

STAGES = (0, 1, 2, 3)
STEPS = 10


def overrides(stage: int) -> dict[str, Any]:
    return {"train.zero_stage": stage, "train.micro_batch": 1, "train.steps": STEPS}


def job(lab: Path, out: Path, stage: int) -> dict[str, Any]:
    return {"lab": str(lab), "out": str(out), "overrides": overrides(stage)}


def kill_at(lab: Path, out: Path, stage: int, *, row: int, folder: Path) -> bytes:
    """Start a run of two ranks and kill both with -9 after `row` rows; metrics.jsonl after the kill."""
    group = start_group([job(lab, out, stage)], folder=folder)
    metrics = out / "metrics.jsonl"
    try:
        until = time.monotonic() + 120
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < row:
            assert time.monotonic() < until and all(rank.exitcode is None for rank in group), folder
            time.sleep(0.001)
    finally:
        kill_group(group)
    return metrics.read_bytes()


def kept_rows(out: Path) -> int:
    """Steps of the checkpoint that a resume of `out` starts from."""
    latest = out / "checkpoints" / "latest"
    return int(latest.resolve().name.removeprefix("step_")) if latest.exists() else 0


@pytest.fixture(scope="module")
def trials(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`never_N`, `killed_N` (killed once, then resumed) and metrics.jsonl after the kill, for every ZeRO stage N."""
    folder = tmp_path_factory.mktemp("resume")
    run_group([job(lab, folder / f"never_{stage}", stage) for stage in STAGES], folder=folder / "reference")
    rng = random.Random(SEED)
    for stage in STAGES:
        out = folder / f"killed_{stage}"
        left = kill_at(lab, out, stage, row=rng.randint(2, 7), folder=folder / f"kill_{stage}")
        (folder / f"left_{stage}").write_bytes(b"".join(left.splitlines(keepends=True)[: kept_rows(out)]))
    resumed = [job(lab, folder / f"killed_{stage}", stage) for stage in STAGES]
    for name, stage in (("stayed", 1), ("moved", 3)):  # both continue from the end of ZeRO 1
        shutil.copytree(folder / "never_1", folder / name, symlinks=True)
        resumed.append(job(lab, folder / name, stage))
        resumed[-1]["overrides"]["train.steps"] = STEPS + 4
    run_group(resumed, folder=folder / "resumed")
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_every_loss_after_a_kill_is_that_of_a_run_never_stopped_to_the_bit(trials: Path, stage: int) -> None:
    never, killed = trials / f"never_{stage}", trials / f"killed_{stage}"
    assert losses(killed) == losses(never) and len(losses(killed)) == STEPS
    assert [row["batch"] for row in rows(killed)] == [row["batch"] for row in rows(never)]
    assert [row["grad_norm"] for row in rows(killed)] == [row["grad_norm"] for row in rows(never)]


@pytest.mark.parametrize("stage", STAGES)
def test_rows_up_to_the_checkpoint_stay_byte_for_byte_and_no_step_stands_twice(trials: Path, stage: int) -> None:
    left = (trials / f"left_{stage}").read_bytes()
    assert (trials / f"killed_{stage}" / "metrics.jsonl").read_bytes().startswith(left)


@pytest.mark.parametrize("stage", STAGES)
def test_the_zero_stage_does_not_change_the_training(trials: Path, stage: int) -> None:
    assert losses(trials / f"never_{stage}") == pytest.approx(losses(trials / "never_0"), rel=5e-3)


def test_a_run_goes_on_at_another_zero_stage(trials: Path) -> None:
    stayed, moved = losses(trials / "stayed"), losses(trials / "moved")
    assert moved[:STEPS] == stayed[:STEPS] == losses(trials / "never_1")
    assert len(moved) == STEPS + 4 and moved == pytest.approx(stayed, rel=5e-3)


@pytest.mark.long
@pytest.mark.parametrize("trial", range(4 * TRIALS))
def test_any_number_of_kills_at_any_moment_costs_nothing(lab: Path, trials: Path, tmp_path: Path, trial: int) -> None:
    """Kills come at random times, so they hit starts, steps, saves and deletions."""
    rng = random.Random(1000 * SEED + trial)
    stage, out = rng.choice(STAGES), tmp_path / "run"
    for number in range(3):
        group = start_group([job(lab, out, stage)], folder=tmp_path / str(number))
        while not (out / "config.yaml").exists() and all(rank.exitcode is None for rank in group):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3))
        kill_group(rng.sample(group, 2))
    run_group([job(lab, out, stage)], folder=tmp_path / "last")
    assert losses(out) == losses(trials / f"never_{stage}")
