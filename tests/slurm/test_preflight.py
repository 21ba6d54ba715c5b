"""A job that SLURM would refuse or never start is refused on the login node, in one line."""

import re
from pathlib import Path

import pytest
import yaml
from cluster import Cluster
from command import flowmask
from runs import run_config

from flowmask.launch.slurm.submission import Submission


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch.partition=fast"], "launch.partition is fast; this cluster has main, gentle, high, gpu"),
        (["launch.time_min=600"], "launch.time_min is 600; partition main allows 120"),
        (["launch.nodes=3"], "launch.nodes is 3; partition main has TotalNodes 2"),
        (["launch.cpus_per_node=64"], "SLURM would refuse the job"),
        (["launch.mem_gb=9000"], "SLURM would refuse the job"),
        (["launch.constraint=h100"], "SLURM would refuse the job"),
        (["cache.device=auto"], "partition main has no GPUs: choose another launch.partition, or run on its CPUs"),
        (["cache.device=auto", "launch.partition=gpu", "launch.processes_per_node=3"], "no node with more than 2 GPUs"),
    ],
)
def test_a_job_that_could_never_run_is_not_submitted(
    cluster: Cluster, lab: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    out = tmp_path / "cache"
    done = flowmask("submit", lab / "cache.yaml", f"out={out}", "launch.cluster=slurm", *words)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1], done.stderr
    assert not out.exists()
    assert not cluster.run("squeue", "-h")


def test_a_gpu_job_that_says_nothing_of_gpus_gets_one_a_process_on_the_node_that_has_them(
    cluster: Cluster, lab: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "cache", tmp_path / "seen"
    words = ["cache.device=auto", "cache.views=1", "launch.cluster=slurm", "launch.partition=gpu"]
    setup = f"launch.setup=['echo $SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES > {seen}']"
    done = flowmask("cache", "build", lab / "cache.yaml", f"out={out}", *words, setup, "launch.processes_per_node=2")
    assert done.returncode == 0, done.stderr
    assert seen.read_text().split() == ["2", "0,1"]
    submission = Submission.latest(out)
    assert submission is not None
    job = cluster.job_fields(submission.slurm()[0])
    assert job["TresPerNode"] == "gres:gpu:2" and job["NodeList"] == "g1"
    assert job["CPUs/Task"] == "2"  # the whole node; the threads of two processes could use more


def test_a_dry_run_tells_when_the_job_could_start(cluster: Cluster, lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    done = flowmask("submit", lab / "cache.yaml", f"out={out}", "launch.cluster=slurm", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stdout and "partition main: 2 nodes" in done.stdout
    assert "could not be checked here:\n#   encoder weights" in done.stdout
    assert not out.exists()


def test_deepspeed_reads_its_config_before_the_job_is_sent(cluster: Cluster, lab: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(run_config(lab, tmp_path / "run").model_dump(mode="json")))
    words = ("launch.cluster=slurm", "launch.nodes=2", "launch.gpus_per_node=0", "--dry-run")
    done = flowmask("submit", path, *words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"checked:.*#   DeepSpeed [\d.]+ accepts the config of this training", done.stdout, re.DOTALL)
    assert "submit would refuse" not in done.stdout
