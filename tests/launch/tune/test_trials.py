"""One candidate in real processes, the part of a job on one machine, and the knowledge of its memory."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from command import start_flowmask

from flowmask.launch.config import load_job
from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.plan import speed_of
from flowmask.launch.plan.settings import Settings
from flowmask.launch.plan.train import plan_training
from flowmask.launch.tune import here, trials
from flowmask.launch.tune.here import Room, on_this_machine
from flowmask.launch.tune.search import Timing
from flowmask.launch.tune.worker import REASON
from flowmask.models.device import gpu_holds
from flowmask.models.errors import ConfigError
from flowmask.trainer.train_config import accumulation_steps

PATIENCE_S = 300


def test_a_trial_is_the_run_itself_and_leaves_no_process_and_no_checkpoint(world: Path, tmp_path: Path) -> None:
    told: list[int] = []
    measure = trials.Trials(tmp_path, lambda what, done, total: told.append(done))
    job = load_job(world / "train.yaml", TrainJob, [])
    before = set(psutil.Process().children(recursive=True))
    timing = measure(job, {}, until=time.monotonic() + PATIENCE_S, best=Timing({}))
    assert timing.unit_s is not None and timing.unit_s > 0 and not timing.said
    assert set(psutil.Process().children(recursive=True)) <= before
    folder = tmp_path / "001"
    assert not list((folder / "run" / "checkpoints").glob("*"))
    rows = trials.rows_of(folder, job)
    assert max(told) >= 7 and [row["step"] for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.long
def test_a_killed_search_leaves_no_process_behind(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = start_flowmask("tune", world / "train.yaml", "--minutes", 30)
    until = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob("*/001/run/metrics.jsonl")):
        assert time.monotonic() < until and command.poll() is None
        time.sleep(0.1)
    started = psutil.Process(command.pid).children(recursive=True)
    assert len(started) == 2, "the launcher and its rank"
    command.send_signal(signal.SIGKILL)
    command.wait()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    ("reason", "fits"), [("rank 0 was killed by SIGKILL (often by the kernel)", False), ("no compiler here", True)]
)
def test_what_did_not_fit_is_told_from_what_failed(reason: str, fits: bool, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / REASON).write_text(reason)
    timing = trials.failed({"train.compile": True}, tmp_path)
    assert timing.no_room != fits and reason in timing.said and timing.unit_s is None


def test_of_the_config_as_given_only_a_want_of_memory_is_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    with pytest.raises(ConfigError) as full, gpu_holds("this train job", fix="lower it"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    (tmp_path / "0" / REASON).write_text(str(full.value))
    assert trials.failed({}, tmp_path).no_room
    (tmp_path / "0" / REASON).write_text("the cache is damaged")
    with pytest.raises(ConfigError, match="the cache is damaged"):
        trials.failed({}, tmp_path)


def test_a_machine_gets_its_share_of_the_batch_in_as_many_passes(world: Path, tmp_path: Path) -> None:
    for nodes, ranks, parallel, micro in ((1, 2, 1, 1), (4, 2, 1, 1), (2, 4, 2, 2), (8, 1, 1, 3)):
        words = [f"launch.nodes={nodes}", f"launch.processes_per_node={ranks}", "launch.cluster=slurm"]
        words += ["train.global_batch=48", f"train.micro_batch={micro}", f"train.sequence_parallel={parallel}"]
        job = load_job(world / "train.yaml", TrainJob, words)
        part = TrainJob.model_validate(trials.trial_of(job, tmp_path))
        assert (part.launch.cluster, part.launch.world_size) == ("local", ranks)
        passes = accumulation_steps(job.train, nodes * ranks)
        assert accumulation_steps(part.train, ranks) == passes and part.train.micro_batch == micro


def test_what_fits_is_what_plan_says(world: Path) -> None:
    given = load_job(world / "train.yaml", TrainJob, [])
    settings, speed = Settings(given), speed_of(gpu=None, tflops=None, mfu=0.4)
    other = load_job(world / "train.yaml", TrainJob, ["train.micro_batch=2", "train.activation_checkpointing=none"])
    for job in (given, other):
        assert settings.of(job) == plan_training(job, speed=speed).chosen
    small, large = settings.of(given).device.peak, settings.of(other).device.peak
    room = Room(given, (small + large) / 2)
    assert not room.refuses(given) and room.refuses(other)
    room.is_too_small_for(given)
    assert room.refuses(given), "what has failed is not tried again"


def test_a_gpu_is_asked_for_its_name_its_free_memory_and_the_kernels_that_it_can_run(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 80))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def ask(code: str) -> tuple[Any, str]:
        exec(code, {})
        return json.loads(capsys.readouterr().out), ""

    monkeypatch.setattr(here, "ask", ask)
    job = on_this_machine(load_job(world / "train.yaml", TrainJob, []))
    assert here.hardware(job) == here.Hardware("a GPU", 5, ("native",)), "the others want a newer GPU"
    monkeypatch.setattr(here, "ask", lambda code: (None, "it hangs"))
    with pytest.raises(ConfigError, match="the GPU does not answer: it hangs; see"):
        here.hardware(job)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert here.hardware(job).name == f"CPU, {len(os.sched_getaffinity(0))} cores"
