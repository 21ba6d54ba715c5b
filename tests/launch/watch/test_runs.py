"""The answers and actions of `flowmask status`, `logs` and `stop` match real trainings."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Started, flowmask, start_flowmask
from runs import make_lab, rows, run_config

from flowmask.launch.cli import main as cli
from flowmask.launch.watch.runs import look

PATIENCE_S = 180
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    make_lab(folder)
    return folder


def config(lab: Path, out: Path, **overrides: Any) -> Path:
    keys = {"train.steps": 1_000_000, "checkpoint.every_steps": 1_000_000, "train.micro_batch": 1, **overrides}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(run_config(lab, out, keys).model_dump(mode="json")))
    return path


def until(condition: Callable[[], object], *commands: Started) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        over = [command for command in commands if command.poll() is not None]
        if over or time.monotonic() > end:
            pytest.fail(over[0].communicate()[0] if over else "waited too long")
        time.sleep(0.05)


def steps_done(out: Path) -> int:
    return (look(out).step or 0) if (out / "metrics.jsonl").exists() else 0


def test_a_run_is_seen_while_it_trains_and_stops_for_good_with_everything_saved(
    lab: Path, tmp_path: Path, started: list[Started]
) -> None:
    out = tmp_path / "runs" / "mine"
    out.parent.mkdir()
    path = config(lab, out)
    training = start_flowmask("train", path, "launch.processes_per_node=2")
    started.append(training)
    until(lambda: steps_done(out) >= 12, training)
    following = start_flowmask("logs", out, "-f")
    started.append(following)

    said = flowmask("status", tmp_path, "--json")
    (status,) = json.loads(said.stdout)
    assert (status["state"], status["kind"], status["steps"]) == ("running", "train", 1_000_000)
    assert 12 <= status["step"] <= steps_done(out) and status["restarts"] == 0
    real = rows(out)
    assert status["eta_s"] == pytest.approx((1_000_000 - status["step"]) * status["step_s"])
    took = (real[-1]["time"] - real[0]["time"]) / (len(real) - 1)
    assert took / 4 < status["step_s"] < took * 4
    assert Path(status["logs"]).read_text().count("step") > 1

    stopped = flowmask("stop", out)
    assert stopped.returncode == 0, stopped.stderr
    assert training.wait(timeout=PATIENCE_S) == 75
    last = rows(out)[-1]["step"]
    assert stopped.stdout.split() == [str(out), "is", "stopped", "at", "step", str(last)]
    assert (out / "checkpoints" / "latest").readlink().name == f"step_{last:08d}"
    assert "stopped by a signal" in following.communicate(timeout=PATIENCE_S)[0].splitlines()[-1]
    assert look(out).state == "stopped"

    again = start_flowmask("train", path, f"train.steps={last + 100_000}", "launch.processes_per_node=2")
    started.append(again)
    until(lambda: steps_done(out) > last, again)
    assert (look(out).state, look(out).restarts, look(out).steps) == ("running", 1, last + 100_000)
    again.kill()
    again.wait()
    until(lambda: look(out).state != "running")
    assert look(out).state == "failed" and "was killed" in look(out).why


def test_a_run_that_failed_says_why_and_one_that_ended_well_is_finished(lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    path = config(lab, out, **{"train.steps": 2})
    failed = flowmask("train", path, f"model.init={tmp_path / 'nowhere'}")
    assert failed.returncode == 2
    status = look(out)
    assert status.state == "failed"
    assert status.why in failed.stderr and "nowhere does not exist" in status.why
    assert flowmask("train", path).returncode == 0
    assert (look(out).state, look(out).step, look(out).why) == ("finished", 2, "")


@pytest.mark.parametrize("words", [("status",), ("logs",), ("stop",)])
@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_folder_that_is_no_run_is_one_line(
    words: tuple[str, ...], name: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["flowmask", *words, str(tmp_path / name)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and f"{tmp_path / name} " in said.err
