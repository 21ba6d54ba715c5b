"""An array of tasks on two real nodes builds the cache of one process, also when tasks are killed."""

import contextlib
import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from cluster import Cluster
from command import Started, flowmask, start_flowmask

from flowmask.data_pipeline.build.build import build
from flowmask.launch.config import load_job
from flowmask.launch.jobs import CacheJob
from flowmask.launch.slurm.submission import Submission

PATIENCE_S = 240
SHARED = {"config.yaml"}  # contains the launch settings


def contents(cache: Path) -> dict[str, str]:
    """Hash of every file that belongs to the cache."""
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.relative_to(cache).parts[0] not in SHARED | {"launch"}
    }


@pytest.fixture(scope="module")
def one_process(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("alone") / "cache"
    build(load_job(lab / "cache.yaml", CacheJob, [f"out={out}"]))
    return contents(out)


def until(condition: Callable[[], object], command: Started) -> None:
    """Wait for a condition while a command runs."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if command.poll() is not None or time.monotonic() > end:
            pytest.fail(f"the command ended, or waited, too long: {command.communicate(timeout=5)[0]}")
        time.sleep(0.05)


def test_an_array_that_loses_two_tasks_builds_the_bytes_of_one_process(
    cluster: Cluster, lab: Path, tmp_path: Path, one_process: dict[str, str]
) -> None:
    out = tmp_path / "cache"
    array = ("launch.cluster=slurm", "launch.array=4", "launch.max_crashes=0")
    array = (*array, "launch.cpus_per_node=1")  # all four at once
    command = start_flowmask("cache", "build", lab / "cache.yaml", f"out={out}", *array)
    until(lambda: len(list((out / "shards").glob("*.tar"))) >= 3, command)
    submission = Submission.latest(out)
    assert submission is not None
    job, tasks = submission.slurm()
    assert tasks == 4
    nodes = {cluster.job_fields(f"{job}_{task}").get("NodeList") for task in range(4)}
    assert nodes == {"n1", "n2"}
    cluster.run("scancel", f"{job}_1")
    for process in cluster.processes(SLURM_ARRAY_JOB_ID=job, SLURM_ARRAY_TASK_ID="2"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    said, _ = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 0, said
    assert contents(out) == one_process
    assert not (out / "work").exists()


@pytest.mark.long
def test_two_processes_a_task_build_the_same_bytes(
    cluster: Cluster, lab: Path, tmp_path: Path, one_process: dict[str, str]
) -> None:
    out = tmp_path / "cache"
    words = ("launch.cluster=slurm", "launch.array=2", "launch.processes_per_node=2")
    done = flowmask("cache", "build", lab / "cache.yaml", f"out={out}", *words)
    assert done.returncode == 0, done.stderr
    assert contents(out) == one_process


def test_what_is_wrong_reaches_the_person_in_one_line(cluster: Cluster, lab: Path, tmp_path: Path) -> None:
    shutil.copytree(lab / "wan", tmp_path / "wan")
    weights = next((tmp_path / "wan" / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    words = ("launch.cluster=slurm", "launch.array=2", f"model.wan={tmp_path / 'wan'}")
    done = flowmask("cache", "build", lab / "cache.yaml", f"out={tmp_path / 'cache'}", *words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("flowmask: ") and str(weights) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_who_stops_waiting_leaves_the_job_running_and_learns_how_to_watch_it(
    cluster: Cluster, lab: Path, tmp_path: Path
) -> None:
    out, config = tmp_path / "cache", tmp_path / "held.yaml"
    held = yaml.safe_load((lab / "cache.yaml").read_text())  # a job that can't end before the test asks for it
    held["launch"] = {**held.get("launch", {}), "setup": [f"until [ -e {tmp_path}/go ]; do sleep 0.1; done"]}
    config.write_text(yaml.safe_dump(held))
    command = start_flowmask("cache", "build", config, f"out={out}", "launch.cluster=slurm")
    until(lambda: list(out.glob("launch/*/slurm.json")), command)
    job = json.loads(next(out.glob("launch/*/slurm.json")).read_text())["job_id"]
    cluster.wait_for_state(job, "RUNNING")
    command.send_signal(signal.SIGINT)
    said, _ = command.communicate(timeout=60)
    assert command.returncode == 130
    assert f"flowmask status {out}" in said.replace("\n", "") and f"scancel {job}" in said
    assert cluster.job_state(job) == "RUNNING"
    (tmp_path / "go").touch()
    cluster.wait_for_state(job, "COMPLETED")
