"""A rank's time line: every second is in one phase, files are bounded, and a stranger's lines are skipped."""

import json
from pathlib import Path
from typing import Any

import pytest

from flowmask.models.errors import CheckpointError
from flowmask.trainer import phases as watch
from flowmask.trainer.explain import timeline
from flowmask.trainer.explain.run_page import page_file, write_run_page
from flowmask.trainer.explain.timeline import TIMELINE, TimelineFile, read_timeline
from flowmask.trainer.phases import PHASES, REDUCE, Call, Pending, Phases, Spent

SPENT = Spent(10, 1.25, {"read": 0.25, "forward": 0.5, REDUCE: 0.5})


class Ticking:
    """A clock that a test moves. It can also act as events, whose time is known only after they are past."""

    def __init__(self, *, laps_late: int = 0) -> None:
        self.now, self.LAPS_LATE, self.asked_too_early = 0.0, laps_late, 0
        self.done = float("inf") if not laps_late else 0.0

    def stamp(self) -> float:
        return self.now

    def seconds(self, begun: float, ended: float) -> float:
        self.asked_too_early += ended > self.done
        return ended - begun

    def is_past(self, mark: float) -> bool:
        return mark <= self.done

    def keep(self, marks: list[float]) -> None: ...


class FakeEvent:
    """torch's event on a device that is `BEHIND` seconds late. As in torch, reading an unfinished event is an error."""

    now, made, BEHIND = 0.0, 0, 10.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        FakeEvent.made += 1

    def record(self) -> None:
        self.at = FakeEvent.now

    def query(self) -> bool:
        return self.at + self.BEHIND <= FakeEvent.now

    def elapsed_time(self, other: "FakeEvent") -> float:
        if not (self.query() and other.query()):
            raise RuntimeError("device not ready")
        return 1000 * (other.at - self.at)


def watched(monkeypatch: pytest.MonkeyPatch, clock: Ticking) -> Phases:
    monkeypatch.setattr(watch, "_HostClock", lambda: clock)
    return Phases()


def take_a_step(phases: Phases, clock: Any) -> None:
    for phase, seconds in (("read", 3.0), ("forward", 5.0), ("backward", 7.0), ("optimizer", 2.0), ("other", 1.0)):
        phases.enter(phase)
        clock.now += seconds
        if phase == "read":
            phases.copied(1.0)
        if phase == "backward":
            with phases.waiting(phases.begin("all_reduce", [])), phases.waiting(phases.begin("reduce", [])):
                clock.now += 4.0
    phases.end_lap()


def test_every_second_is_in_one_phase_and_waiting_is_no_part_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    phases = watched(monkeypatch, clock)
    for _ in range(2):
        take_a_step(phases, clock)
    spent = phases.take()
    assert spent.steps == 2 and spent.total_s == sum(spent.phases.values()) == 44.0
    own = {"read": 4.0, "copy": 2.0, "forward": 10.0, "backward": 14.0, "optimizer": 4.0, "other": 2.0}
    assert {name: seconds for name, seconds in spent.phases.items() if seconds} == own | {REDUCE: 8.0}
    assert phases.take() == Spent(0, 0.0, {}) and set(own) <= set(PHASES)


def test_events_are_read_a_lap_late_and_never_before_they_are_past(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking(laps_late=1)
    phases = watched(monkeypatch, clock)
    take_a_step(phases, clock)
    assert phases.take().steps == 0
    clock.done = clock.now
    take_a_step(phases, clock)
    assert phases.take().steps == 1 and not clock.asked_too_early
    take_a_step(phases, clock)  # the device is behind: this lap is lost, and no code waits for it
    assert phases.take().steps == 0 and not clock.asked_too_early


class Work:
    def __init__(self, phases: Phases) -> None:
        self.phases, self.seen = phases, None

    def wait(self) -> str:
        self.seen: Any = self.phases.waiting_for
        return "done"

    def is_completed(self) -> bool:
        return True


def test_events_are_used_again_only_when_no_lap_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(FakeEvent, "made", 0)
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    phases, clock, made = Phases("cuda"), FakeEvent, []
    for _ in range(6):
        take_a_step(phases, clock)
        made.append(clock.made)
        clock.now += 1.0
    assert made[2:] == made[2:3] * 4, "events are used again"
    spent = phases.take()
    assert spent.steps == 5
    assert spent.phases == pytest.approx(
        {
            "other": 5 * 2.0 - 1.0,
            "read": 10.0,
            "copy": 5.0,
            "forward": 25.0,
            "backward": 35.0,
            "optimizer": 10.0,
            REDUCE: 20.0,
        }
    )
    assert spent.total_s == pytest.approx(sum(spent.phases.values()))


def test_an_asynchronous_collective_is_waited_for_where_its_handle_is() -> None:
    phases = Phases()
    call = phases.begin("all_gather", [None, type("T", (), {"shape": (2, 3), "dtype": "torch.float32"})()])
    assert call == Call(1, "all_gather", (2, 3), "float32") and str(call) == "all_gather number 1 (float32 [2, 3])"
    handle = Pending(Work(phases), call, phases)
    assert handle.is_completed() and handle.wait() == "done"
    assert handle._work.seen == call and phases.waiting_for is None and phases.last == call


def test_a_time_line_comes_back_as_it_was_written_and_a_file_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "FILE_BYTES", 4000)
    file = TimelineFile(tmp_path, rank=3, world_size=4)
    for step in range(10, 1010, 10):
        file.add(step, SPENT)
    file.add(1010, Spent(0, 0.0, {}))
    file.close()
    found = sorted((tmp_path / TIMELINE).iterdir())
    assert [path.name for path in found] == ["rank-00003.jsonl", "rank-00003.old.jsonl"]
    assert all(path.stat().st_size < 4500 for path in found)
    samples = read_timeline(tmp_path)
    steps = sorted(sample.step for sample in samples)
    assert steps == list(range(steps[0], 1010, 10)) and len(steps) > 10
    assert {(one.rank, one.world_size, one.total_s, one.a_step("forward")) for one in samples} == {(3, 4, 1.25, 0.05)}
    assert all(one.memory["host_memory_gib"] > 0 for one in samples)


def test_a_disk_that_refuses_costs_samples_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / TIMELINE).write_text("a file in the place of the folder")
    TimelineFile(tmp_path, rank=0, world_size=1).add(1, SPENT)
    (tmp_path / TIMELINE).unlink()
    (tmp_path / TIMELINE).mkdir()
    (tmp_path / TIMELINE / "rank-00000.jsonl").symlink_to(tmp_path / "elsewhere")
    TimelineFile(tmp_path, rank=0, world_size=1).add(1, SPENT)
    assert not (tmp_path / "elsewhere").exists()


BROKEN = [
    {},
    [],
    3,
    {"rank": -1},
    {"step": 1 << 60},
    {"total_s": -1.0},
    {"phases": {"read": "<b>"}},
    {"host": "x" * 999},
]


def test_a_strangers_lines_are_passed_over_and_none_is_markup(tmp_path: Path) -> None:
    (tmp_path / TIMELINE).mkdir()
    base = {"rank": 0, "world_size": 1, "host": "<script>", "step": 10, "steps": 10, "time": 1.0, "total_s": 2.0}
    good: dict[str, Any] = base | {"phases": {"read": 1.0, "<i>": 1.0}, "memory": {}}
    lines = [json.dumps(good | change if isinstance(change, dict) else change) for change in BROKEN[1:]]
    text = "\n".join([*lines, json.dumps(good), '{"rank": NaN}', "no json", "[" * 9999])
    (tmp_path / TIMELINE / "rank-00000.jsonl").write_text(text)
    assert len(read_timeline(tmp_path)) == 1
    write_run_page(tmp_path, page_file(tmp_path, None))
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page.replace("<script>\nfor", "") and "<i>" not in page and "http" not in page


def test_a_run_without_a_time_line_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no time line: .* yet \(train.log_every_steps\)"):
        write_run_page(tmp_path, page_file(tmp_path, None))
