"""A job that a job submits is as if from a login node; the first job's environment changes nothing."""

import shlex
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster import Cluster
from command import environment
from runs import run_config

from flowmask.launch.slurm.submission import Submission
from flowmask.models.process import is_of_a_group

PATIENCE_S = 240
# The outer job is a task of an array, was requeued once, and holds an allocation when it submits.
SUBMITS = """#!/bin/sh
[ -n "$SLURM_RESTART_COUNT" ] || {{ scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_3"; sleep 60; }}
export RANK=5 WORLD_SIZE=9 LOCAL_RANK=5 MASTER_ADDR=192.0.2.1 MASTER_PORT=9 PMI_RANK=5 TORCHELASTIC_RUN_ID=x
export SBATCH_PARTITION=high SBATCH_TIMELIMIT=1 SLURM_TIME_FORMAT=relative SQUEUE_STATES=FAILED
env > {folder}/outer
salloc --nodes=1 --ntasks=1 --mem-per-cpu=100 {command} || touch {folder}/failed
"""


@pytest.mark.long  # tests/launch/slurm/test_environment.py removes the same variables without a SLURM
def test_a_job_inherits_nothing_of_the_jobs_that_it_is_submitted_from(
    cluster: Cluster, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "run", tmp_path / "run.yaml"
    tree = run_config(lab, out, {"train.steps": 4}).model_dump(mode="json")
    launch = {"cluster": "slurm", "nodes": 2, "gpus_per_node": 0, "cpus_per_node": 1, "mem_gb": 0.5, "max_crashes": 0}
    config.write_text(yaml.safe_dump(tree | {"launch": launch | {"setup": [f"env > {tmp_path}/inner"]}}))
    words = [sys.executable, "-m", "flowmask", "train", str(config), "--no-wait"]
    (tmp_path / "submits.sh").write_text(SUBMITS.format(folder=tmp_path, command=shlex.join(words)))
    options = ("--array=3", "--requeue", "--mem-per-cpu=200", "--time=30", f"--output={tmp_path}/said")
    monkeypatch.setitem(cluster.environment, "PYTHONPATH", environment()["PYTHONPATH"])
    around = cluster.run("sbatch", "--parsable", *options, tmp_path / "submits.sh") + "_3"
    until = time.monotonic() + PATIENCE_S
    while cluster.job_fields(around).get("Restarts") != "1":
        assert time.monotonic() < until, cluster.job_state(around)
        time.sleep(0.2)
    cluster.start_now(around)
    while (submission := Submission.latest(out)) is None or not submission.verdicts():
        said = (tmp_path / "said").read_text() if (tmp_path / "said").exists() else cluster.job_state(around)
        assert time.monotonic() < until and not (tmp_path / "failed").exists(), said
        time.sleep(0.2)
    assert [attempt.why for attempt in submission.attempts(array=0)] == ["finished"]
    assert "ignored variables: SBATCH_PARTITION, SBATCH_TIMELIMIT" in (tmp_path / "said").read_text()

    outer, inner = (variables(tmp_path / name) for name in ("outer", "inner"))
    foreign = {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_MEM_PER_CPU"}
    assert foreign <= outer.keys() and foreign.isdisjoint(inner)
    assert not [name for name in inner if is_of_a_group(name) or name.startswith("SBATCH_")]
    assert inner["SLURM_JOB_ID"] == submission.slurm()[0] and inner["SLURM_JOB_PARTITION"] == "main"


def variables(dump: Path) -> dict[str, str]:
    """The variables in the output of `env`."""
    return dict(line.split("=", 1) for line in dump.read_text().splitlines() if "=" in line)
