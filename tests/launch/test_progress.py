"""A user always sees progress: a moving bar on a terminal, lines elsewhere."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmask.launch import progress
from flowmask.models.safe.words import PlainConsole
from flowmask.trainer.score.results import Scores


def _console(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setattr(progress, "err", PlainConsole(file=written, force_terminal=terminal, width=100))
    return written


def _wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_in_a_pipe_a_line_comes_when_something_begins_and_again_and_again_while_it_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = _console(monkeypatch, terminal=False)
    with progress.told(every_s=0.01) as update:
        update("weights", 0, 1)
        assert written.getvalue().startswith("weights: 0 of 1, ")
        _wait(lambda: written.getvalue().count("weights: 0 of 1, ") >= 4)
        update("windows", 2, 7)
        _wait(lambda: written.getvalue().count("windows: 2 of 7, ") >= 4)
    said = written.getvalue()
    time.sleep(0.05)
    assert written.getvalue() == said, "and none when it is over"


def test_in_a_pipe_quick_pieces_are_not_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    written = _console(monkeypatch, terminal=False)
    with progress.told() as update:
        for done in range(1000):
            update("frames", done, 1000)
            update("sentences", done, 1000)
    assert written.getvalue().count("\n") == 2


def test_a_terminal_shows_that_time_passes_while_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    written = _console(monkeypatch, terminal=True)
    with progress.told() as update:
        update("weights", 0, 1)
        _wait(lambda: "0:00:02" in written.getvalue())
        assert "0:00:01" in written.getvalue() and "weights" in written.getvalue()


def test_at_the_end_of_an_evaluation_stands_where_the_archive_for_the_server_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nothing: dict[str, Any] = {name: {} for name in ("totals", "per_expression", "weights")}
    nothing["nothing"] = dict.fromkeys(("n_acc", "t_acc", "final", "jf_target"))
    nothing |= dict.fromkeys(("shuffled_text", "decoder", "protocol", "intervals", "slices"))
    scores = Scores(videos=1, expressions=2, frames=1, no_target=0, checkpoint="run", note="", **nothing)
    progress.show_scores(scores, Path("e"), archive=True)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "1 video, 2 expressions, 1 frame; report: e/report.html",
        "for the benchmark's server: e/submission.zip",
    ]
    progress.show_scores(scores, Path("e"))
    assert "submission.zip" not in capsys.readouterr().out
