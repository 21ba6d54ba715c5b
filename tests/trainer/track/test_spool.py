"""MLflow's files in a run folder are read whole, once, and with the same result each time."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmask.trainer.track import spool
from flowmask.trainer.track.points import StepPoints
from flowmask.trainer.track.spool import Outbox, Sent, TrackingPlan


def write_rows(folder: Path, steps: range, **fields: Any) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "time": step, "loss": float(step), **fields}) + "\n")


@given(every=st.integers(1, 7), cuts=st.lists(st.integers(0, 40), max_size=5), limit=st.integers(1, 4))
def test_points_are_the_same_wherever_sending_stops_and_starts_again(
    tmp_path_factory: pytest.TempPathFactory, every: int, cuts: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    found, after, written = [], 0, 0
    for cut in [*sorted(cuts), 41]:
        write_rows(folder, range(written + 1, cut + 1))
        written = max(written, cut)
        points = StepPoints(folder, every_steps=every, after=after)
        while batch := points.take(limit, final=cut == 41):
            found += batch
            after = batch[-1].step  # the server's answer to a new sender
    assert [p.step for p in found] == [*range(every, 41 + 1, every)] + ([41] if 41 % every else [])
    for before, point in zip([0, *(p.step for p in found)], found, strict=False):
        assert point.metrics["loss"] == (before + 1 + point.step) / 2 and point.time_ms == 1000 * point.step


def test_a_window_that_an_earlier_start_began_is_whole_and_skips_count_from_the_first_step(tmp_path: Path) -> None:
    write_rows(tmp_path, range(1, 4), skipped=True)
    write_rows(tmp_path, range(4, 9))
    (point,) = StepPoints(tmp_path, every_steps=4, after=6).take(10, final=False)
    assert (point.step, point.metrics) == (8, {"loss": 6.5, "skipped_steps": 3.0})


def test_a_torn_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    write_rows(tmp_path, range(1, 2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, ')
    points = StepPoints(tmp_path, every_steps=1, after=0)
    assert [p.step for p in points.take(9, final=False)] == [1]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('"loss": 1.0, "time": 1}\n')
    assert [p.step for p in points.take(9, final=False)] == [2]


def test_a_file_that_takes_the_place_of_the_rows_is_not_followed(tmp_path: Path) -> None:
    write_rows(tmp_path, range(1, 6))
    points = StepPoints(tmp_path, every_steps=1, after=0)
    assert len(points.take(9, final=False)) == 5
    (tmp_path / "metrics.jsonl").rename(tmp_path / "old")
    write_rows(tmp_path, range(1, 20))
    assert points.take(9, final=True) == []


def test_an_evaluation_that_is_repeated_counts_once_and_a_torn_note_spoils_no_other(tmp_path: Path) -> None:
    spool.add_metrics(tmp_path, 10, {"eval_loss": 1.0, "broken": float("nan")})
    with (tmp_path / spool.OUTBOX).open("a") as file:
        file.write('{"step": 11, "metr')
    spool.add_metrics(tmp_path, 10, {"eval_loss": 2.0, "eval_jf": 3.0})
    spool.add_artifact(tmp_path, tmp_path / "a.mp4", to="evaluation")
    notes = Outbox(tmp_path, offset=0).take()
    assert [note.point.metrics for note in notes if note.point] == [{"eval_loss": 1.0}, {"eval_jf": 3.0}]
    assert (notes[-1].artifact, notes[-1].to, notes[-1].weights) == (tmp_path / "a.mp4", "evaluation", False)
    spool.add_metrics(tmp_path, 10, {"eval_loss": 1.0}, of="another measurement")
    assert [note.point.metrics for note in Outbox(tmp_path, offset=notes[-1].end).take() if note.point] == [
        {"eval_loss": 1.0}
    ]
    notes = Outbox(tmp_path, offset=0).take()
    outbox = Outbox(tmp_path, offset=notes[0].end)
    assert outbox.take() == notes[1:] and outbox.take() == []


def test_the_key_of_a_run_outlives_a_plan_that_another_version_wrote(tmp_path: Path) -> None:
    first = spool.key_of(tmp_path)
    assert first != spool.key_of(tmp_path)
    (tmp_path / "tracking.json").write_text('{"key": "abc", "run_id": "r"}')
    assert spool.key_of(tmp_path) == "abc" and spool.read_plan(tmp_path) is None
    (tmp_path / "tracking.json").write_text("{")
    assert len(spool.key_of(tmp_path)) == 32


def test_what_one_server_has_says_nothing_about_another(tmp_path: Path) -> None:
    sent = Sent(uri="http://a", run_id="r", outbox_bytes=7)
    spool.write_sent(tmp_path, sent)
    assert spool.read_sent(tmp_path, uri="http://a") == sent
    assert spool.read_sent(tmp_path, uri="http://b") == Sent(uri="http://b")
    plan = TrackingPlan(key="k", uri="u", experiment="e", name="n", params={"a": "1"}, status="KILLED")
    spool.write_plan(tmp_path, plan)
    assert spool.read_plan(tmp_path) == plan
