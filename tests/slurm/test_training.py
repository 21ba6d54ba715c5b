"""Training on two real nodes gives the numbers of one machine, also when the cluster takes the nodes away."""

import contextlib
import json
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from cluster import Cluster
from command import flowmask
from runs import run_config, unequal_tensors

from flowmask.launch.slurm.submission import Submission
from flowmask.trainer.state.provenance import git_commit

PATIENCE_S = 180
STEPS = 400
CPU_JOB = ("launch.gpus_per_node=0",)


def config(lab: Path, out: Path, **overrides: Any) -> Path:
    """A run of two ranks in all. It saves often enough to lose little, and seldom enough to lose something."""
    keys = {"train.steps": STEPS, "checkpoint.every_steps": 50, "train.log_every_steps": 50, **overrides}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(run_config(lab, out, keys).model_dump(mode="json")))
    return path


def submit(path: Path, *words: str) -> tuple[Submission, str]:
    """Submit a run to SLURM on two nodes; return its files and its job id."""
    done = flowmask("train", path, "launch.cluster=slurm", "launch.nodes=2", *CPU_JOB, *words, "--no-wait")
    assert done.returncode == 0, done.stderr
    submission = Submission.latest(Path(yaml.safe_load(path.read_text())["out"]))
    assert submission is not None
    return submission, submission.slurm()[0]


def step_of(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("\n") else 0


def until(condition: Callable[[], object], submission: Submission, *, every_s: float = 0.05) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            pytest.fail("\n".join([str(submission.attempts(array=0)), *submission.log_tail(60)]))
        time.sleep(every_s)


def until_step(out: Path, step: int, submission: Submission) -> None:
    until(lambda: step_of(out) >= step, submission)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Masters, moments and averages of the last checkpoints are equal to the bit, on every rank."""
    for out in (ours, theirs):
        assert (out / "checkpoints" / "latest").readlink().name == f"step_{STEPS:08d}"
    assert not unequal_tensors(ours, theirs)


def rows(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def ranks_of(cluster: Cluster, job: str) -> list[psutil.Process]:
    """The training processes on both nodes."""
    return [one for one in cluster.processes(SLURM_JOB_ID=job) if "flowmask.launch.local.worker" in one.cmdline()]


def finished(submission: Submission) -> list[str | None]:
    """Wait until the job has ended for good; the reason for the end of each attempt."""
    until(submission.verdicts, submission)
    return [attempt.why for attempt in submission.attempts(array=0)]


@pytest.fixture(scope="module")
def undisturbed(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one machine without a disturbance."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = flowmask("train", config(lab, out), "launch.processes_per_node=2")
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_that_is_preempted_twice_ends_with_the_weights_of_one_that_never_was(
    cluster: Cluster, lab: Path, tmp_path: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    submission, job = submit(config(lab, out))
    until_step(out, 20, submission)
    cluster.preempt()  # without grace: SIGTERM, KillWait, SIGKILL; SLURM requeues
    cluster.wait_for_state(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "Partition=gentle")
    cluster.start_now(job)
    until_step(out, step_of(out) + 20, submission)
    cluster.preempt()  # with grace: SIGTERM and a minute; a job that leaves early must requeue itself
    cluster.wait_for_state(job, "PENDING")
    cluster.start_now(job)
    assert finished(submission) == ["preempted", "preempted", "finished"]
    assert cluster.job_fields(job)["Restarts"] == "2"
    assert_same_weights(out, undisturbed)
    assert rows(out) == rows(undisturbed)


@pytest.mark.long  # SLURM needs a minute to notice a dead node
def test_a_run_that_loses_the_node_of_its_batch_script_ends_with_the_same_weights(
    cluster: Cluster, lab: Path, tmp_path: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    submission, job = submit(config(lab, out))
    until_step(out, 20, submission)
    cluster.kill_node("n1")
    cluster.wait_for_state(job, "PENDING", timeout_s=PATIENCE_S)
    cluster.restart_node("n1")
    cluster.start_now(job)
    assert finished(submission) == ["node lost", "finished"]
    assert_same_weights(out, undisturbed)
    assert rows(out) == rows(undisturbed)


def test_a_time_limit_requeues_and_scancel_ends_for_good(cluster: Cluster, lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    path = config(lab, out, **{"train.steps": 1_000_000, "checkpoint.every_steps": 1_000_000, "tracking.enabled": True})
    submission, job = submit(path, "launch.time_min=100", "launch.signal_margin_s=10")
    until_step(out, 20, submission)
    cluster.bring_limit_near(job)
    until(lambda: submission.attempts(array=0), submission)
    assert submission.attempts(array=0)[0].why == "time limit"
    saved = step_of(out)
    assert submission.attempts(array=0)[0].checkpoint == f"step_{saved:08d}"
    cluster.wait_for_state(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    cluster.start_now(job)
    until_step(out, saved + 20, submission)
    steps = [step for step, _ in rows(out)]
    assert steps == list(range(1, len(steps) + 1))
    cluster.run("scancel", job)
    assert finished(submission) == ["time limit", "cancelled"]
    cluster.wait_for_state(job, "CANCELLED")
    assert cluster.job_fields(job)["Restarts"] == "1"
    assert (out / "checkpoints" / "latest").readlink().name == f"step_{step_of(out):08d}"
    with contextlib.closing(sqlite3.connect(out.parent / "mlflow.db")) as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("KILLED",)]
        tags = dict(database.execute("SELECT key, value FROM tags").fetchall())
    assert tags["mlflow.source.git.commit"] == git_commit().removesuffix("-dirty")  # although it ran from a snapshot
    assert tags["slurm_job"] == job


@pytest.mark.long
def test_a_save_that_does_not_fit_the_margin_keeps_the_checkpoint_before(
    cluster: Cluster, lab: Path, tmp_path: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    submission, job = submit(config(lab, out), "launch.time_min=100", "launch.signal_margin_s=10")
    until_step(out, 60, submission)
    stuck = ranks_of(cluster, job)[0]  # like a rank whose file system does not answer
    stuck.suspend()
    cluster.bring_limit_near(job)

    def over() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            stuck.suspend()  # SLURM sends SIGCONT with its signals
        return bool(submission.attempts(array=0))

    until(over, submission, every_s=0.005)
    (attempt,) = submission.attempts(array=0)
    assert attempt.why == "time limit" and "launch.signal_margin_s is 10" in attempt.message
    saved = int(attempt.checkpoint.removeprefix("step_"))
    assert saved % 50 == 0 and 0 < saved <= step_of(out)
    cluster.wait_for_state(job, "PENDING")
    assert not ranks_of(cluster, job)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    cluster.start_now(job)
    assert finished(submission) == ["time limit", "finished"]
    assert_same_weights(out, undisturbed)
    assert rows(out) == rows(undisturbed)


@pytest.mark.long
def test_two_ranks_on_each_of_two_nodes_train_as_four_on_one_machine(
    cluster: Cluster, lab: Path, tmp_path: Path
) -> None:
    four, keys = "launch.processes_per_node=4", {"train.micro_batch": 1, "train.steps": 40}
    alone, out = tmp_path / "alone", tmp_path / "run"
    done = flowmask("train", config(lab, alone, **keys), four)
    assert done.returncode == 0, done.stderr
    submission, _ = submit(config(lab, out, **keys), "launch.processes_per_node=2")
    assert finished(submission) == ["finished"]
    assert rows(out) == rows(alone) and len(rows(out)) == 40
    assert {path.name for path in (out / "checkpoints" / "latest").glob("rank_*")} == {
        f"rank_{rank:05d}.safetensors" for rank in range(4)
    }


@pytest.mark.long  # tests/launch/slurm/test_requeue.py counts crashes on a fake SLURM
def test_a_crash_loop_stops_with_its_reason(cluster: Cluster, lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    submission, job = submit(config(lab, out, **{"train.steps": 1_000_000}), "launch.max_crashes=1")
    for crash in range(2):
        before = step_of(out)
        until_step(out, before + 20, submission)
        ranks_of(cluster, job)[0].send_signal(signal.SIGKILL)
        until(lambda wanted=crash + 1: len(submission.attempts(array=0)) == wanted, submission)
        if crash == 0:
            cluster.start_now(job)
    cluster.wait_for_state(job, "FAILED")
    assert [attempt.why for attempt in submission.attempts(array=0)] == ["crashed", "crashed"]
    verdict = submission.verdicts()[0]
    assert verdict.code == 2 and "launch.max_crashes is 1" in verdict.message
    assert cluster.job_fields(job)["ExitCode"] == "2:0"
