"""What SLURM would refuse, or leave in the queue for ever, is refused on the login node, in one line."""

import re
from pathlib import Path

import pytest
import yaml
from cluster import Cluster
from command import flowmask
from runs import run_config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch.partition=fast"], "launch.partition is fast; this cluster has main, gentle, high"),
        (["launch.time_min=600"], "launch.time_min is 600; partition main allows 120"),
        (["launch.nodes=3"], "launch.nodes is 3; partition main has TotalNodes 2"),
        (["launch.cpus_per_node=64"], "SLURM would refuse the job"),
        (["launch.mem_gb=9000"], "SLURM would refuse the job"),
        (["launch.constraint=h100"], "SLURM would refuse the job"),
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


def test_a_dry_run_tells_when_the_job_could_start(cluster: Cluster, lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    done = flowmask("submit", lab / "cache.yaml", f"out={out}", "launch.cluster=slurm", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stdout and "partition main: 2 nodes" in done.stdout
    assert "could not be checked here:\n#   encoder weights" in done.stdout
    assert not out.exists()


def test_deepspeed_reads_its_config_before_the_job_is_sent(
    cluster: Cluster, lab: Path, tmp_path: Path
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(run_config(lab, tmp_path / "run").model_dump(mode="json")))
    done = flowmask("submit", path, "launch.cluster=slurm", "launch.nodes=2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"checked:.*#   DeepSpeed [\d.]+ takes its config of this training", done.stdout, re.DOTALL
    )
    assert "submit would refuse" not in done.stdout
