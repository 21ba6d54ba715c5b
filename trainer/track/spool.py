"""What lies in a run folder for MLflow: the plan of the MLflow run, what it has, and what is still to be sent.

    tracking.json         the plan: our own id of the run, server, params, status; written by the trainer
    tracking_sent.json    the MLflow run's id and how much of the outbox is there; written by the sender
    tracking_outbox.jsonl metrics and artifacts other than the steps'

The steps' metrics are metrics.jsonl itself: how far MLflow has them, MLflow is asked. One sender at a time,
held by flock. Knows nothing of MLflow.
"""

import fcntl
import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from flowmask.models.files import write_atomically
from flowmask.trainer.state.run_folder import METRICS, TRACKING
from flowmask.trainer.track.meters import Row, summarise

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

SENT, OUTBOX, _LOCK = "tracking_sent.json", "tracking_outbox.jsonl", ".tracking.lock"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class TrackingPlan(_Document):
    """All that a sender needs to know of a run, whenever and wherever it is started."""

    key: str
    uri: str
    experiment: str
    name: str
    params: dict[str, str] = {}
    every_steps: int = 1
    end_timeout_s: float = 30.0
    status: Status = "RUNNING"
    run_id: str | None = None


class Sent(_Document):
    """What the server at `uri` has: the run, and the first bytes of the outbox."""

    uri: str
    run_id: str | None = None
    outbox_bytes: int = 0


class Point(NamedTuple):
    """Metrics of one step as MLflow keeps them."""

    step: int
    time_ms: int
    metrics: dict[str, float]


class Note(NamedTuple):
    """One line of the outbox: a point, or a file or folder for the artifacts under `to`."""

    point: Point | None
    artifact: Path | None
    to: str | None
    end: int  # the byte behind it


def read_plan(folder: Path) -> TrackingPlan | None:
    """The run's plan; None if it was never tracked or the file is damaged."""
    try:
        return TrackingPlan.model_validate_json((folder / TRACKING).read_bytes())
    except (OSError, ValidationError):
        return None


def write_plan(folder: Path, plan: TrackingPlan) -> None:
    write_atomically(folder / TRACKING, plan.model_dump_json(indent=1))


def key_of(folder: Path) -> str:
    """Our own id of the run: the one it has, or a new one."""
    try:
        key = json.loads((folder / TRACKING).read_bytes())["key"]
        return key if isinstance(key, str) and key else uuid.uuid4().hex
    except (OSError, ValueError, KeyError, TypeError):
        return uuid.uuid4().hex


def read_sent(folder: Path, *, uri: str) -> Sent:
    """What the server at `uri` is known to have; nothing if the file speaks of another server."""
    try:
        sent = Sent.model_validate_json((folder / SENT).read_bytes())
    except (OSError, ValidationError):
        return Sent(uri=uri)
    return sent if sent.uri == uri else Sent(uri=uri)


def write_sent(folder: Path, sent: Sent) -> None:
    write_atomically(folder / SENT, sent.model_dump_json())


class StepPoints:
    """The points of metrics.jsonl behind step `after`: one for each window of `every_steps` steps.

    Which steps make a point depends on the rows and `after` alone, so a batch that is built again is the
    same batch. Rows of steps up to `after` (trained again since a kill) are passed over.
    """

    def __init__(self, folder: Path, *, every_steps: int, after: int) -> None:
        self._rows, self._every, self._after = _Tail(folder / METRICS), every_steps, after
        self._skipped = 0
        self._window: list[Row] = []

    def take(self, limit: int, *, final: bool) -> list[Point]:
        """Up to `limit` points that are there by now; `final`: nothing follows, so a part of a window counts."""
        points = []
        for row, _ in self._rows.rows():
            point = self._point_of(row)
            if point is not None:
                points.append(point)
            if len(points) == limit:
                return points
        if final and self._window:
            points.append(self._close_window())
        return points

    def _point_of(self, row: dict[str, Any]) -> Point | None:
        step = row.get("step")
        if not isinstance(step, int):
            return None
        self._skipped += bool(row.get("skipped"))
        if step <= self._after:
            return None
        self._window.append(row)
        return self._close_window() if step % self._every == 0 else None

    def _close_window(self) -> Point:
        window, self._window = self._window, []
        last = window[-1]
        self._after = last["step"]
        metrics = summarise(window) | {"skipped_steps": float(self._skipped)}
        return Point(last["step"], int(1000 * last.get("time", 0)), metrics)


def add_metrics(folder: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Leave metrics that are not a training step's (an evaluation's) for the sender."""
    finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
    _append(folder, {"step": step, "time": time.time(), "metrics": finite})


def add_artifact(folder: Path, path: Path, *, to: str | None) -> None:
    """Leave a file or folder for the sender, by its path: it is read when it is sent, and not copied."""
    _append(folder, {"artifact": str(path.resolve()), "to": to})


class Outbox:
    """The notes behind byte `offset`; a metric of a step that stands earlier in the file is not given twice.

    An evaluation that is repeated after a kill is such a case.
    """

    def __init__(self, folder: Path, *, offset: int) -> None:
        self._rows, self._sent_up_to = _Tail(folder / OUTBOX), offset
        self._seen: set[tuple[int, str]] = set()

    def take(self) -> list[Note]:
        """The notes that are there by now and were not taken yet."""
        notes = []
        for row, end in self._rows.rows():
            note = self._note_of(row, end)
            if note is not None and end > self._sent_up_to:
                notes.append(note)
        return notes

    def _note_of(self, row: dict[str, Any], end: int) -> Note | None:
        if isinstance(row.get("artifact"), str):
            return Note(None, Path(row["artifact"]), row.get("to"), end)
        if not isinstance(row.get("metrics"), dict):
            return None
        step = int(row["step"])
        new = {key: value for key, value in row["metrics"].items() if (step, key) not in self._seen}
        self._seen |= {(step, key) for key in new}
        return Note(Point(step, int(1000 * row["time"]), new), None, None, end)


@contextmanager
def only_sender(folder: Path) -> Iterator[None]:
    """Wait until no other process sends for this folder, and be the one that does."""
    with (folder / _LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _append(folder: Path, row: Mapping[str, Any]) -> None:
    """One line in one write, so that writers in several processes never mix theirs.

    It starts with a line break, so that a line which a kill has torn spoils no other.
    """
    with (folder / OUTBOX).open("ab", buffering=0) as file:
        file.write(b"\n" + json.dumps(row, allow_nan=False).encode() + b"\n")


class _Tail:
    """Follows a file of JSON lines by one handle: when another file takes its place, this one has no more rows."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._file: IO[bytes] | None = None

    def rows(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Rows that end with a line break and were not given yet, each with the byte behind it."""
        if self._file is None:
            if not self._path.exists():
                return
            self._file = self._path.open("rb")
        self._file.seek(self._offset)
        for line in self._file:
            if not line.endswith(b"\n"):
                return
            self._offset += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row, self._offset
