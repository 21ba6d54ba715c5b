"""A profile of a live run: a file requests it, every rank writes a trace, and the training continues in any case."""

import json
import threading
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from runs import losses, start

from flowmask.launch.watch.profile import ProfileError, profile
from flowmask.models.errors import UserError
from flowmask.trainer import phases
from flowmask.trainer.explain.profile import PROFILE, REQUEST, LiveProfile
from flowmask.trainer.run.run_state import Run

OLDER = Path(__file__).parents[2] / "golden" / "older"
MARKS = 10  # of the clock in a step: two in each of the two micro-batches, and six more
STEPS = 600  # enough for a request in the middle; the run is stopped when the traces are there


def test_a_live_run_is_profiled_and_goes_on_as_if_nobody_had_asked(lab: Path, tmp_path: Path) -> None:
    out, found = tmp_path / "run", list[Any]()

    def ask() -> None:
        while not found:
            try:
                found.append(profile(out, steps=2, timeout_s=300))
            except UserError as error:  # the run has not begun
                if "has ended" in str(error) or (out / "checkpoints" / "latest").exists():
                    found.append(error)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    quick = {"train.steps": STEPS, "train.log_every_steps": 1, "checkpoint.every_steps": 10**6}
    marks, at = [0], list[int]()

    def stamp() -> float:
        marks[0] += 1
        return perf_counter()

    def advance(run: Run, result: Any) -> None:
        real(run, result)
        at.append(marks[0])
        if found:
            run.request_stop()

    real = Run.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "advance", advance)
        patch.setattr(phases._HostClock, "stamp", staticmethod(stamp))
        code = start(lab, out, quick)
    assert {after - before for before, after in pairwise(at)} == {MARKS}, (
        "what a step costs, beside a line now and then"
    )
    asker.join(300)
    (folder,) = found
    assert isinstance(folder, Path), folder
    first = int(folder.name.removeprefix("step-"))
    trace = json.loads((folder / "rank-00000.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert any("AdamW" in name or "adamw" in name for name in names) and "aten::linear" in names
    assert code in (0, 75) and len(losses(out)) > first + 1
    assert not (out / PROFILE / REQUEST).exists()
    assert f"profiled the steps from {first} on: {folder}" in (out / "log.txt").read_text()
    with pytest.raises(ProfileError, match=r"^.*: 0 of 1 ranks have written a profile: they were not there after 1 s"):
        profile(out, steps=2, timeout_s=1)
    assert not (out / PROFILE / REQUEST).exists()


def live(run: Path, said: list[str], *, rank: int = 1) -> LiveProfile:
    return LiveProfile(run, rank=rank, cuda=False, say=said.append)


def test_each_rank_writes_its_own_trace_and_a_request_is_heard_once(tmp_path: Path) -> None:
    said: list[str] = []
    one = live(tmp_path, said)
    assert one.asked() == 0
    (tmp_path / PROFILE).mkdir()
    (tmp_path / PROFILE / REQUEST).write_text('{"steps": 1}')
    assert one.asked() == 1 and one.asked() == 0
    one.begin(7, steps=1)
    torch.ones(3) @ torch.ones(3)
    one.step_done()
    one.step_done()
    assert [path.name for path in (tmp_path / PROFILE).rglob("*.json")] == ["rank-00001.json"]
    assert len(said) == 1 and "step-00000007" in said[0]


@pytest.mark.parametrize("request_", ['{"steps": 0}', '{"steps": 51}', '{"steps": "<many>"}', "[]", "\x00", ""])
def test_a_request_that_asks_for_nothing_sensible_is_one_line_and_gone(tmp_path: Path, request_: str) -> None:
    said: list[str] = []
    (tmp_path / PROFILE).mkdir()
    (tmp_path / PROFILE / REQUEST).write_text(request_)
    assert live(tmp_path, said).asked() == 0
    assert len(said) == 1 and "asks for no profile" in said[0] and "\n" not in said[0]
    assert not (tmp_path / PROFILE / REQUEST).exists()


def test_a_profiler_that_fails_or_a_disk_that_refuses_never_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    (tmp_path / PROFILE).write_text("a file in the place of the folder")
    one = live(tmp_path, said)
    one.begin(1, steps=1)
    one.step_done()
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: 1 / 0)
    one.begin(2, steps=1)
    one.step_done()
    one.close()
    assert len(said) == 2 and all(line.startswith("no profile: ") for line in said)
    assert all(line.endswith("training goes on") for line in said)


def test_a_folder_that_is_no_run_or_a_run_that_is_not_alive_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        profile(tmp_path, steps=3, timeout_s=1)
    with pytest.raises(ProfileError, match=r"run is (idle|finished), not running; a profile is taken of steps while"):
        profile(OLDER / "run", steps=3, timeout_s=1)
