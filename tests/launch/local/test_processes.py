"""A launcher leaves no rank behind and passes signals on; a run can continue after any kind of death."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import flowmask, start_flowmask, start_python

PATIENCE_S = 120
ENDS_WITHIN_S = 5


def rows(run: Path) -> list[dict[str, object]]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_row(run: Path, step: int, launcher: object) -> None:
    until = time.monotonic() + PATIENCE_S
    while not (done := rows(run)) or done[-1]["step"] < step:  # type: ignore[operator]
        assert time.monotonic() < until and launcher.poll() is None, "the run ended before it got there"  # type: ignore[attr-defined]
        time.sleep(0.02)


@pytest.fixture
def command(smoke: Path, tmp_path: Path) -> list[object]:
    config = smoke / "runs" / "dit" / "config.yaml"
    return ["train", config, f"out={tmp_path / 'run'}", "train.steps=400", "checkpoint.every_steps=2"]


def test_a_run_survives_the_death_of_its_launcher_of_a_rank_and_a_polite_stop(
    command: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher: Any = start_python(*command)
    wait_for_row(run, 3, launcher)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=ENDS_WITHIN_S)
    assert not alive

    launcher = start_flowmask(*command)
    wait_for_row(run, 6, launcher)
    victim = psutil.Process(launcher.pid).children()[1]
    victim.send_signal(signal.SIGKILL)
    said, _ = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 2
    assert "rank 1 was killed by SIGKILL" in said

    launcher = start_flowmask(*command)
    wait_for_row(run, 9, launcher)
    os.kill(launcher.pid, signal.SIGTERM)
    said, _ = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 75, said

    stopped_at = rows(run)[-1]["step"]
    done = flowmask(*command[:3], f"train.steps={stopped_at + 2}", "checkpoint.every_steps=2")  # type: ignore[operator]
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(run)] == list(range(1, stopped_at + 3))  # type: ignore[operator]
