"""The resources that a job requests on a SLURM node where its config is open, and when they are refused."""

from pathlib import Path
from typing import Any

import pytest
from fake_slurm import fake_slurm

from flowmask.launch.check import preflight
from flowmask.launch.config import validate
from flowmask.launch.jobs import CacheJob, EvaluateJob, TrainJob
from flowmask.launch.jobs.job import Job
from flowmask.launch.slurm.resources import Asked, gpus_of, settle
from flowmask.models.errors import ConfigError

TRAIN: dict[str, Any] = {
    "out": "runs/a",
    "model": {"wan": "weights/wan"},
    "data": {"cache": "caches/a", "threads": 3},
    "train": {"steps": 10, "global_batch": 8, "micro_batch": 1},
}
CACHE: dict[str, Any] = {
    "out": "caches/a",
    "model": {"wan": "weights/wan"},
    "data": {"root": "datasets/a"},
    "cache": {"decode_threads": 5},
}
EVALUATE: dict[str, Any] = {"out": "scores", "checkpoint": "runs/a", "data": {"root": "datasets/a"}}
TREES = {TrainJob: TRAIN, CacheJob: CACHE, EvaluateJob: EVALUATE}


def job(kind: type[Job], tree: dict[str, Any] | None = None, **launch: Any) -> Job:
    launch = {"cluster": "slurm", "processes_per_node": 2, **launch}
    return validate({**TREES[kind], **(tree or {}), "launch": launch}, kind, origin="job.yaml")


def refused(asked: Asked) -> str:
    """The one line of a refused submission; empty if it is accepted."""
    try:
        preflight.refuse(list(asked.findings))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("facts", "gpus"),
    [
        ({"Gres": "gpu:8"}, 8),
        ({"Gres": "gpu:a100:8(S:0-1)"}, 8),
        ({"Gres": "gpu:a100:4(S:0,2),gpu:v100:2(S:1),nvme:1T"}, 6),
        ({"Gres": "gpu:a100_3g.20gb:2"}, 2),
        ({"Gres": "gpu"}, 1),
        ({"Gres": "gpu:tesla"}, 1),
        ({"Gres": "gpu:a100:no_consume:2"}, 2),
        ({"Gres": "mps:100,shard:16"}, 0),
        ({"Gres": "(null)", "CfgTRES": "cpu=64,mem=500G,billing=64"}, 0),
        ({"Gres": "(null)", "CfgTRES": "cpu=64,mem=500G,billing=64,gres/gpu=4,gres/gpu:a100=4"}, 4),
        ({"TRES": "cpu=128,node=2,billing=128,gres/gpu=16"}, 16),
        ({}, 0),
    ],
)
def test_the_gpus_of_a_node_are_read_from_what_scontrol_shows(facts: dict[str, str], gpus: int) -> None:
    assert gpus_of(facts) == gpus


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("nodes", [("gpu:8", 64), ("gpu:a100:8(S:0-1)", 64)])
def test_a_gpu_job_asks_for_a_gpu_a_process_and_cpus_for_its_threads(
    kind: type[Job], nodes: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm(tmp_path, monkeypatch, {"gpu": [nodes]})
    asked = settle(job(kind, partition="gpu"))
    threads = {TrainJob: 3, CacheJob: 5, EvaluateJob: 0}[kind]
    assert (asked.launch.gpus_per_node, asked.launch.cpus_per_node) == (2, 2 * (1 + threads))
    assert not refused(asked)
    assert "2 GPUs (one per process)" in asked.said and f"{2 * (1 + threads)} CPUs" in asked.said


@pytest.mark.parametrize(
    ("nodes", "gpus", "cpus"),
    [
        ([("(null)", 64), ("gpu:4", 64)], 2, 8),  # mixed: SLURM takes a node with GPUs
        ([("gpu:4", 64), ("gpu:4", 6)], 2, 6),  # not more CPUs than the smallest node has
        ([("gpu:4", 1)], 2, 1),
    ],
)
def test_the_nodes_of_the_partition_decide(
    nodes: list[tuple[str, int]], gpus: int, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm(tmp_path, monkeypatch, {"gpu": nodes, "other": [("(null)", 1)]})
    asked = settle(job(TrainJob))  # in the default partition, the first
    assert (asked.launch.gpus_per_node, asked.launch.cpus_per_node) == (gpus, cpus)
    assert ("smallest node" in asked.said) == (cpus < 8)


@pytest.mark.parametrize("partition", [None, "main"])
@pytest.mark.parametrize("kind", TREES)
def test_a_gpu_job_for_a_partition_without_gpus_is_refused_with_both_ways_out(
    kind: type[Job], partition: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm(tmp_path, monkeypatch, {"main": [("(null)", 64)], "gpu": [("gpu:8", 64)]})
    line = refused(settle(job(kind, partition=partition)))
    assert "partition main has no GPUs" in line
    assert "launch.partition" in line and "launch.gpus_per_node=0" in line and "\n" not in line


@pytest.mark.parametrize(
    ("kind", "tree", "launch"),
    [
        (TrainJob, {}, {"gpus_per_node": 0}),
        (CacheJob, {"cache": {"device": "cpu"}}, {}),
        (EvaluateJob, {"device": "cpu"}, {}),
    ],
)
@pytest.mark.parametrize("gres", ["(null)", "gpu:8"])
def test_who_says_that_a_job_is_for_cpus_gets_no_gpu_and_no_refusal(
    kind: type[Job],
    tree: dict[str, Any],
    launch: dict[str, Any],
    gres: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_slurm(tmp_path, monkeypatch, {"main": [(gres, 64)]})
    asked = settle(job(kind, tree, **launch))
    assert not asked.launch.gpus_per_node and not asked.findings
    assert "no GPUs" in asked.said


def test_more_processes_than_a_node_has_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path, monkeypatch, {"gpu": [("gpu:4", 64), ("gpu:2", 64)]})
    line = refused(settle(job(TrainJob, processes_per_node=8)))
    assert "launch.processes_per_node is 8" in line and "4 GPUs" in line


def test_a_cluster_that_hides_its_nodes_is_asked_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path, monkeypatch, {"gpu": []})
    asked = settle(job(TrainJob))
    assert "launch.gpus_per_node" in refused(asked) and "shows no nodes of partition gpu" in refused(asked)
    assert asked.launch.cpus_per_node == 8


def test_gpus_that_sbatch_args_ask_for_are_not_asked_for_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path, monkeypatch, {"gpu": [("gpu:4", 64)]})
    asked = settle(job(TrainJob, sbatch_args={"gres": "gpu:a100:2"}))
    assert asked.launch.gpus_per_node is None and not asked.findings
    assert "gres=gpu:a100:2" in asked.said


def test_what_the_config_says_is_what_is_asked_for_and_slurm_is_not_consulted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = settle(job(TrainJob, gpus_per_node=4, cpus_per_node=3, processes_per_node=4))
    assert (asked.launch.gpus_per_node, asked.launch.cpus_per_node) == (4, 3)
    assert not asked.findings


def test_gpus_that_no_process_would_use_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = settle(job(TrainJob, gpus_per_node=8, cpus_per_node=3, processes_per_node=1)).findings
    assert found.state == "warn" and "7 GPUs would be idle; set launch.processes_per_node=8" in found.said


def test_without_slurm_one_warning_names_the_key_and_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = settle(job(TrainJob))
    (check,) = asked.findings
    assert check.state == "unknown" and "warning: launch.gpus_per_node is not set" in check.said
    assert asked.launch.gpus_per_node is None and asked.launch.cpus_per_node == 8
