"""`flowmask status` and `stop` on a running cache build and on a running evaluation."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Started, flowmask, start_flowmask
from golden_export import BOX, DATA, write_golden_export
from runs import cache_settings, make_lab

from flowmask.launch.jobs.job import RunStatus
from flowmask.launch.watch.runs import look, look_at_all

PATIENCE_S = 180
pytestmark = pytest.mark.usefixtures("one_thread")


def written(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tree, default=str))))
    return path


def until(condition: Callable[[], object], command: Started) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if command.poll() is not None or time.monotonic() > end:
            pytest.fail(command.communicate()[0] if command.poll() is not None else "waited too long")
        time.sleep(0.05)


def looked(out: Path) -> RunStatus:
    """The status of a run, which can still be before its start."""
    (status,) = look_at_all([out])
    return status


def seen(out: Path) -> dict[str, Any]:
    (status,) = json.loads(flowmask("status", out, "--json").stdout)
    return status


@pytest.mark.long
def test_a_build_is_seen_stops_and_goes_on(tmp_path: Path, started: list[Started]) -> None:
    make_lab(tmp_path / "lab")
    out = tmp_path / "cache"
    tree = cache_settings(tmp_path / "lab") | {
        "out": out,
        "cache": {"clips_per_shard": 1, "views": 400, "device": "cpu"},
    }
    path = written(tmp_path / "cache.yaml", tree)
    build = start_flowmask("cache", "build", path, "launch.processes_per_node=2")
    started.append(build)
    until(lambda: (looked(out).step or 0) > 3, build)
    status = seen(out)
    assert (status["state"], status["kind"]) == ("running", "cache")
    assert 3 < status["step"] < status["steps"] and status["eta_s"] > 0

    stopped = flowmask("stop", out)
    assert stopped.returncode == 0, stopped.stderr
    assert build.wait(timeout=PATIENCE_S) == 75
    assert look(out).state not in ("running", "finished")
    done = seen(out)["step"]
    assert done >= status["step"]

    again = start_flowmask("cache", "build", path)
    started.append(again)
    until(lambda: look(out).state == "running" and (look(out).step or 0) > done, again)


@pytest.mark.long
def test_an_evaluation_is_seen_stops_and_goes_on(tmp_path: Path, started: list[Started]) -> None:
    export, out = write_golden_export(tmp_path / "golden"), tmp_path / "scores"
    data = {"source": "mevis", "root": DATA, "split": "valid_u"}
    tree = {"out": out, "checkpoint": export, "data": data, "box": BOX, "precision": "fp32", "device": "cpu"}
    path = written(tmp_path / "evaluate.yaml", tree)
    slow = "sampler.steps=1000"
    command = start_flowmask("evaluate", path, slow)
    started.append(command)
    until(lambda: looked(out).state == "running", command)
    status = seen(out)
    assert (status["state"], status["kind"]) == ("running", "evaluate")

    stopped = flowmask("stop", out)
    assert stopped.returncode == 0, stopped.stderr
    assert command.wait(timeout=PATIENCE_S) == 75
    assert (look(out).state, look(out).why) == ("stopped", "the same command continues")

    done = flowmask("evaluate", path, "sampler.steps=1")
    assert done.returncode == 0, done.stderr
    assert seen(out)["state"] == "finished" and seen(out)["step"] == 2
