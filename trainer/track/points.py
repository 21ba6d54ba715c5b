"""From the rows of metrics.jsonl to the points for MLflow: one point for each window of steps.

The rows may come from another user, and grow during reading.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from flowmask.models.stored.sealed import parse_json
from flowmask.trainer.state.run_folder import METRICS
from flowmask.trainer.track.meters import Row, summarise, window_start

_MOST_TIME_S = 1e12


class Point(NamedTuple):
    """Metrics of one step in MLflow's form."""

    step: int
    time_ms: int
    metrics: dict[str, float]


class StepPoints:
    """The points of metrics.jsonl after step `after`: one for each window of `every_steps` steps.

    A point depends only on the rows, wherever sending stops and starts again: its window begins after the last multiple
    of `every_steps`, like those of the log's lines. Windows up to `after` (trained again after a kill) are skipped.
    last_ms: the time of the newest row read; None before the first.
    """

    def __init__(self, folder: Path, *, every_steps: int, after: int) -> None:
        self._rows, self._every, self._after = Tail(folder / METRICS), every_steps, after
        self._skipped = 0
        self._window: list[Row] = []
        self.last_ms: int | None = None

    def take(self, limit: int, *, final: bool) -> list[Point]:
        """Up to `limit` points of the rows so far; `final`: no more rows follow, so an incomplete window counts."""
        points = []
        for row, _ in self._rows.rows():
            if self._add(row) and self._window[-1]["step"] % self._every == 0:
                points += self._close_window()
            if len(points) == limit:
                return points
        return points + self._close_window() if final else points

    def _add(self, row: dict[str, Any]) -> bool:
        """Add a row to its window, which an earlier row may have begun; False if it is no step's row."""
        step: Any = row.get("step")
        if not has_room_for(step, row.get("time", 0)):
            return False
        self._skipped += bool(row.get("skipped"))
        if self._window and self._window[0]["step"] < window_start(step, self._every):
            self._window = []
        self._window.append(row)
        self.last_ms = int(1000 * row["time"]) if "time" in row else self.last_ms
        return True

    def _close_window(self) -> list[Point]:
        """The point of the window, unless MLflow has it already."""
        window, self._window = self._window, []
        if not window or window[-1]["step"] <= self._after:
            return []
        last = window[-1]
        self._after = last["step"]
        metrics = summarise(window) | {"skipped_steps": float(self._skipped)}
        return [Point(last["step"], int(1000 * last.get("time", 0)), metrics)]


def has_room_for(step: Any, time_s: Any) -> bool:
    """Whether step and time are valid and fit into MLflow's databases."""
    return type(step) is int and 0 <= step < 2**63 and isinstance(time_s, int | float) and abs(time_s) < _MOST_TIME_S


class Tail:
    """Follows a file of JSON lines with one handle; if the file is replaced, it gives no more rows."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._file: IO[bytes] | None = None

    def rows(self) -> Iterator[tuple[dict[str, Any], int]]:
        """New rows that end with a line break, each with the offset of its end."""
        if self._file is None:
            if self._path.is_symlink() or not self._path.is_file():
                return
            self._file = self._path.open("rb")
        self._file.seek(self._offset)
        for line in self._file:
            if not line.endswith(b"\n"):
                return
            self._offset += len(line)
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row, self._offset
