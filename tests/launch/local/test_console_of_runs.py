"""Runs work without a console. The end of a session stops a run, except under nohup."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from command import environment
from consoles import BROKEN, broken, controlling
from runs import rows, run_config

STEPS = 12
PATIENCE_S = 240


def command(lab: Path, out: Path, *, steps: int = STEPS) -> list[str]:
    """Two ranks that print a line each step."""
    keys = {"train.steps": steps, "train.log_every_steps": 1, "checkpoint.every_steps": 1000}
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(run_config(lab, out, keys).model_dump(mode="json")))
    return [sys.executable, "-m", "flowmask", "train", str(config), "launch.processes_per_node=2"]


def assert_whole(out: Path) -> None:
    assert [row["step"] for row in rows(out)] == list(range(1, STEPS + 1))
    assert (out / "checkpoints" / "latest").readlink().name == f"step_{STEPS:08d}"
    log = (out / "log.txt").read_text()
    assert all(f" step {step:>2}/{STEPS} " in log for step in range(1, STEPS + 1)) and "finished at step" in log


def test_a_training_goes_on_when_its_reader_leaves_after_four_lines(lab: Path, tmp_path: Path) -> None:
    head = subprocess.Popen(["head", "-4"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    run = subprocess.Popen(command(lab, tmp_path / "run"), stdout=head.stdin, stderr=head.stdin, env=environment())
    assert head.stdin is not None
    head.stdin.close()
    assert run.wait(timeout=PATIENCE_S) == 0
    assert head.stdout is not None and len(head.stdout.read().splitlines()) == 4
    head.wait()
    assert_whole(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("way", BROKEN)
def test_a_training_goes_on_and_ends_right_without_a_console(way: str, lab: Path, tmp_path: Path) -> None:
    with broken(way) as console:
        run = subprocess.Popen(command(lab, tmp_path / "run"), env=environment(), **console)
        assert run.wait(timeout=PATIENCE_S) == 0
    assert_whole(tmp_path / "run")


@pytest.mark.long
def test_every_kind_of_job_does_its_work_on_a_console_without_room(tmp_path: Path) -> None:
    """The demo runs them all: cache build, trainings, evaluation, prediction."""
    with broken("full disk") as console:
        words = [sys.executable, "-m", "flowmask", "demo", "--smoke", "--out", str(tmp_path / "demo")]
        assert subprocess.run(words, env=environment(), timeout=600, **console).returncode == 0
    assert list((tmp_path / "demo").rglob("scores.json"))


def last_step(out: Path) -> int:
    return int(rows(out)[-1]["step"]) if (out / "metrics.jsonl").exists() and rows(out) else 0


def until_step(out: Path, step: int, run: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE_S
    while last_step(out) < step:
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def ended(run: subprocess.Popen[bytes]) -> int:
    """The run's exit code; none of its processes is left."""
    group = psutil.Process(run.pid).children(recursive=True)
    try:
        return run.wait(timeout=PATIENCE_S)
    finally:
        run.kill()
        for rank in group:
            with suppress(psutil.NoSuchProcess):
                rank.kill()


def ignores_hang_up(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    return bool(mask >> (signal.SIGHUP - 1) & 1)


def test_the_end_of_a_session_saves_and_stops_and_nohup_keeps_launcher_and_ranks_from_hearing_it(
    lab: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = command(lab, out, steps=100_000)
    run = subprocess.Popen(["nohup", *words], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until_step(out, 2, run)
    launcher = psutil.Process(run.pid)
    group = [launcher, *launcher.children()]
    assert len(group) == 3 and all(map(ignores_hang_up, group))
    for process in group:
        process.send_signal(signal.SIGHUP)
    until_step(out, last_step(out) + 20, run)
    run.send_signal(signal.SIGTERM)
    assert ended(run) == 75

    saved = last_step(out)
    master, terminal = pty.openpty()
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    run = subprocess.Popen(words, env=environment(), start_new_session=True, preexec_fn=controlling(terminal), **ends)
    os.close(terminal)
    os.set_blocking(master, False)
    until_step(out, saved + 2, run)
    os.close(master)  # as sshd does: SIGHUP to the session, and EIO for writers
    assert ended(run) == 75
    assert (out / "checkpoints" / "latest").readlink().name == f"step_{last_step(out):08d}"
    assert json.loads((out / ".ended.json").read_text())["code"] == 75
