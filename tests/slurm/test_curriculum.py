"""A curriculum on a real SLURM: every stage has one job after the jobs it needs, also after a kill or a stop."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from command import flowmask, start_flowmask
from curriculum_lab import curriculum, write, write_world

from flowmask.launch.curriculum.jobs import read
from flowmask.launch.watch.runs import look
from flowmask.trainer.state.checkpoint import read_state
from flowmask.trainer.state.steps import complete

PATIENCE_S = 300
STAGES = ("cache_refcoco", "pretrain", "more")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def path(world: Path, tmp_path: Path) -> Path:
    """A cache, a training that never ends, and a training that starts from its weights."""
    tree = curriculum(world, tmp_path)
    tree["launch"] = {"cluster": "slurm", "gpus_per_node": 0}
    stages = {one["name"]: one for one in tree["stages"]}
    stages["pretrain"] |= {"needs": ["cache_refcoco"], "retries": 1}
    stages["pretrain"]["carries"] = {"data.cache": "${stages.cache_refcoco.out}"}
    config = {**stages["pretrain"]["config"], "out": str(tmp_path / "more")}
    carries = {**stages["pretrain"]["carries"], "model.init": "${stages.pretrain.out}"}
    more = {"name": "more", "kind": "train", "config": config, "needs": ["pretrain"], "carries": carries}
    tree["stages"] = [stages["cache_refcoco"], stages["pretrain"], more]
    return write(tmp_path / "curriculum.yaml", tree)


def until(condition: Callable[[], object], what: str, *, command: Any = None) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end or (command is not None and command.poll() is not None):
            pytest.fail(f"{what}: {command.communicate()[0] if command is not None else ''}")
        time.sleep(0.2)


def jobs_of(cluster: Cluster) -> list[str]:
    """Stages of the curriculum whose jobs SLURM knows, one entry a job; `sacct` does not list all waiting jobs."""
    ended = cluster.run("sacct", "-n", "-X", "-P", "-S", "now-1hour", "-o", "JobID,JobName").replace("|", " ")
    queue = cluster.run("squeue", "-h", "--states=all", "-o", "%A %j")
    names = dict(line.split() for line in [*ended.splitlines(), *queue.splitlines()])
    stages = [name.split("-")[1] for name in names.values() if name.startswith("flowmask-")]
    return sorted(stage for stage in stages if stage in STAGES)  # the cluster also ran the jobs of other tests


def slow_sbatch(folder: Path) -> Path:
    """A command `sbatch` that submits, and then waits until `go` is there."""
    real = shutil.which("sbatch")
    (folder / "bin").mkdir()
    script = folder / "bin" / "sbatch"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --test-only ] && exec {real} "$@"\n{real} "$@" >{folder}/said\ntouch {folder}/sent\n'
        f"while [ ! -e {folder}/go ]; do sleep 0.1; done\n"
    )
    script.chmod(0o755)
    return script.parent


@pytest.mark.long
def test_a_submitter_killed_behind_sbatch_submits_no_stage_twice_and_a_stopped_stage_goes_on_later(
    cluster: Cluster, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = ("stages.pretrain.train.steps=1000000", "stages.pretrain.checkpoint.every_steps=1000000")
    endless = (*endless, "stages.pretrain.train.schedule_steps=1000000", "stages.more.train.schedule_steps=4")
    ordinary = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{slow_sbatch(tmp_path)}:{ordinary}")
    first = start_flowmask("curriculum", path, *endless)
    until((tmp_path / "sent").exists, "nothing was submitted", command=first)
    first.kill()
    first.wait()
    monkeypatch.setenv("PATH", ordinary)
    record = read(tmp_path / "curriculum", "cache_refcoco")
    assert record is not None and record.job_id is None
    (tmp_path / "go").touch()
    second = flowmask("curriculum", path, *endless, "--no-wait")
    assert second.returncode == 0, second.stderr
    orphan = (tmp_path / "said").read_text().split()[-1]
    known = (f"cache_refcoco: already submitted as job {orphan}", "cache_refcoco: done")
    assert any(line in second.stderr for line in known), second.stderr
    again = flowmask("curriculum", path, *endless, "--no-wait")
    assert ": submitted job" not in again.stderr, again.stderr
    assert jobs_of(cluster) == sorted(STAGES)

    pretrain, more = (tmp_path / name for name in ("pretrain", "more"))
    until(lambda: (look(pretrain).step or 0) > 20, "the training did not start")
    (running,) = json.loads(flowmask("status", pretrain, "--json").stdout)
    assert running["state"] == "running" and running["job_id"] == read_job(tmp_path, "pretrain")
    waits = look(more)
    assert (waits.state, waits.why) == ("queued", "Dependency")

    cluster.preempt()
    until(lambda: look(pretrain).state == "requeued", "the training was not preempted")
    assert look(pretrain).why.startswith("preempted") and look(more).why == "Dependency"
    cluster.start_now(running["job_id"])
    before = look(pretrain).step or 0
    until(lambda: (look(pretrain).step or 0) > before + 20, "the training did not go on")
    assert look(pretrain).restarts == 1 and look(more).why == "Dependency"

    stopped = flowmask("stop", pretrain)
    assert stopped.returncode == 0, stopped.stderr
    saved = read_state(complete(pretrain / "checkpoints")[0])["step"]
    assert saved == look(pretrain).step and look(pretrain).state == "stopped"
    until(lambda: look(more).state == "stopped", "what was behind it still waits")
    assert "stopped by a signal" in flowmask("logs", pretrain, "-n", "3").stdout
    assert "saved" in flowmask("logs", pretrain, "--rank", "0").stdout

    ending = (*endless, f"stages.pretrain.train.steps={saved + 20}")
    done = flowmask("curriculum", path, *ending, timeout_s=PATIENCE_S * 2)
    assert done.returncode == 0, done.stderr
    assert "all 3 stages are done" in done.stderr and "cache_refcoco: done" in done.stderr
    assert jobs_of(cluster) == sorted([*STAGES, "pretrain", "more"])
    began = read_state(complete(more / "checkpoints")[0])["state"]["init"]
    assert began["source"] == str(pretrain)
    assert read_state(complete(pretrain / "checkpoints")[0])["step"] == saved + 20


def test_a_stage_that_fails_is_named_with_its_reason_and_what_is_behind_it_is_not_started(
    cluster: Cluster, path: Path, tmp_path: Path
) -> None:
    wild = ("train.lr=1e30", "train.grad_clip=0", "guard.max_consecutive_skips=1", "retries=0")
    words = [f"stages.pretrain.{word}" for word in wild]
    failed = flowmask("curriculum", path, *words, timeout_s=PATIENCE_S * 2)
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("flowmask: stage pretrain: ")
    assert "not finite" in failed.stderr.splitlines()[-1]
    assert look(tmp_path / "pretrain").state == "failed"
    assert look(tmp_path / "more").state == "stopped"
    assert not complete(tmp_path / "more" / "checkpoints")


def read_job(tmp_path: Path, stage: str) -> str | None:
    record = read(tmp_path / "curriculum", stage)
    return record.job_id if record else None
