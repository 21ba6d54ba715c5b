"""The files in a run folder for MLflow: the plan of the MLflow run, the sent part, and the data to send.

    tracking.json         the plan: FlowMask's id of the run, server, params, status; written by the trainer with a
                          mark of this user: only then `flowmask track` uses the named server
    tracking_sent.json    the MLflow run's id and the sent part of the outbox; written by the sender
    tracking_outbox.jsonl metrics and artifacts that are not of steps; a file outside of the run has a mark too

Metrics of steps are in metrics.jsonl; MLflow itself is asked for the last sent step. A file lock allows one
sender at a time. The folder may belong to another user.
"""

import fcntl
import json
import math
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowmask.models.errors import UserError
from flowmask.models.files import write_atomically
from flowmask.models.safe.secrets import SecretUri, masked_uri, write_private
from flowmask.models.safe.signature import is_ours, signature
from flowmask.models.stored.sealed import parse_json
from flowmask.trainer.state.run_folder import TRACKING
from flowmask.trainer.track.points import Point, Tail, has_room_for

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

SENT, OUTBOX, _LOCK = "tracking_sent.json", "tracking_outbox.jsonl", ".tracking.lock"
_MOST_MS = 1 << 53
_MOST_BYTES = 4 << 20  # of a document; the params of a run are some KB


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class DatasetFacts(_Document):
    """Facts about a cache of a run for MLflow; digest: start of its fingerprint; counts: numbers of its contents."""

    name: str
    digest: str
    fingerprint: str
    place: str
    context: Literal["training", "evaluation"]
    counts: dict[str, int] = {}


class TrackingPlan(_Document):
    """Everything that a sender needs to know about a run, at any time and place.

    uri: without secrets in the file; asked: the uri of the config. folder: the run's place at its last start.
    started_ms, ended_ms: of the training itself, not of the sending; None: unknown, or not ended.
    parent: folder of the parent run; children: keys of the child runs
    """

    key: str = Field(pattern=r"^[\w-]{1,64}$")
    uri: SecretUri
    experiment: str
    name: str
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    datasets: tuple[DatasetFacts, ...] = ()
    every_steps: int = Field(1, ge=1)
    end_timeout_s: float = Field(30.0, ge=0, allow_inf_nan=False)
    status: Status = "RUNNING"
    run_id: str | None = None
    asked: SecretUri | None = ""
    folder: str = ""
    started_ms: int | None = Field(None, ge=0, lt=_MOST_MS)
    ended_ms: int | None = Field(None, ge=0, lt=_MOST_MS)
    parent: str = ""
    children: tuple[str, ...] = ()


class Sent(_Document):
    """The content of the server at `uri`: the run, its experiment, and the first bytes of the outbox."""

    uri: SecretUri
    run_id: str | None = None
    experiment_id: str | None = None
    outbox_bytes: int = 0


class Note(NamedTuple):
    """One line of the outbox: a point, or a file or folder for the artifacts under `to`.

    may_go: the file is in the run, or this user's own command registered it. weights: sent only on request.
    """

    point: Point | None
    artifact: Path | None
    to: str | None
    end: int  # the byte after it
    may_go: bool = True
    weights: bool = False


def read_plan(folder: Path) -> TrackingPlan | None:
    """The run's plan; None if it was never tracked or the file is damaged."""
    try:
        return TrackingPlan.model_validate_json(_content(folder / TRACKING))
    except (OSError, ValidationError):
        return None


def write_plan(folder: Path, plan: TrackingPlan) -> None:
    """Write the plan, marked as this user's."""
    mark = signature("plan", plan.key, masked_uri(plan.uri))
    write_private(folder / TRACKING, json.dumps(plan.model_dump(mode="json") | {"mark": mark}, indent=1))


def is_plan_ours(folder: Path, plan: TrackingPlan) -> bool:
    """Whether a process of this user wrote the plan in `folder`, so that this user chose the server."""
    try:
        return is_ours(parse_json(_content(folder / TRACKING))["mark"], "plan", plan.key, masked_uri(plan.uri))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def copied_from(folder: Path) -> Path | None:
    """The run of which `folder` is a copy: its plan names another existing folder with the same key."""
    plan = read_plan(folder)
    other = Path(plan.folder) if plan is not None and plan.folder else folder
    try:
        if other.samefile(folder):
            return None
    except (OSError, ValueError):
        return None  # gone: the run was moved
    theirs = read_plan(other)
    return other if plan is not None and theirs is not None and theirs.key == plan.key else None


def forget(folder: Path) -> None:
    """Delete the records of a server's run, so that a new one begins."""
    for name in (SENT, OUTBOX):
        (folder / name).unlink(missing_ok=True)


def key_of(folder: Path) -> str:
    """FlowMask's id of the run: the existing one, or a new one."""
    try:
        key = parse_json(_content(folder / TRACKING))["key"]
        return key if isinstance(key, str) and key else uuid.uuid4().hex
    except (OSError, ValueError, KeyError, TypeError):
        return uuid.uuid4().hex


def read_sent(folder: Path, *, uri: str) -> Sent:
    """The known content of the server at `uri`; empty if the file is about another server."""
    try:
        sent = Sent.model_validate_json(_content(folder / SENT))
    except (OSError, ValidationError):
        return Sent(uri=uri)
    return sent if masked_uri(sent.uri) == masked_uri(uri) else Sent(uri=uri)


def write_sent(folder: Path, sent: Sent) -> None:
    write_atomically(folder / SENT, sent.model_dump_json())


def add_metrics(folder: Path, step: int, metrics: Mapping[str, float], *, of: str = "") -> None:
    """Put metrics that are not a training step's (an evaluation's) into the outbox.

    of: name of the measurement; a step's metric is sent once for each name.
    """
    finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
    _append(folder, {"step": step, "time": time.time(), "metrics": finite} | ({"of": of} if of else {}))


def add_artifact(folder: Path, path: Path, *, to: str | None, weights: bool = False) -> None:
    """Put the path of a file or folder into the outbox: it is read when sent, and not copied."""
    where = str(path.resolve())
    row = {"artifact": where, "to": to, "mark": signature("artifact", where, str(to))}
    _append(folder, row | ({"weights": True} if weights else {}))


class Outbox:
    """The notes after byte `offset`; metrics that the same measurement gave before (a repeat) are left out."""

    def __init__(self, folder: Path, *, offset: int) -> None:
        self._folder, self._rows, self._sent_up_to = folder.resolve(), Tail(folder / OUTBOX), offset
        self._seen: set[tuple[str, int, str]] = set()

    def take(self) -> list[Note]:
        """The notes that are new since the last call."""
        notes = []
        for row, end in self._rows.rows():
            try:
                note = self._note_of(row, end)
            except (KeyError, TypeError, ValueError, OverflowError):
                continue  # not FlowMask's line
            if note is not None and end > self._sent_up_to:
                notes.append(note)
        return notes

    def _note_of(self, row: dict[str, Any], end: int) -> Note | None:
        if isinstance(row.get("artifact"), str):
            path, to = Path(row["artifact"]), None if row.get("to") is None else str(row["to"])
            marked = is_ours(row.get("mark"), "artifact", row["artifact"], str(to))
            may_go = marked or path.resolve().is_relative_to(self._folder)
            return Note(None, path, to, end, may_go=may_go, weights=row.get("weights") is True)
        if not isinstance(row.get("metrics"), dict):
            return None
        step, then = row["step"], row["time"]
        if not has_room_for(step, then):
            return None
        of, given = str(row.get("of", "")), row["metrics"].items()
        new = {k: float(v) for k, v in given if (of, step, k) not in self._seen and math.isfinite(v)}
        self._seen |= {(of, step, key) for key in new}
        return Note(Point(step, int(1000 * then), new), None, None, end)


@contextmanager
def only_sender(folder: Path) -> Iterator[None]:
    """Wait until no other process sends for this folder, and become the only sender."""
    with open(folder / _LOCK, "ab", opener=_itself) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _itself(path: str, flags: int) -> int:
    """Open a file of the folder; do not follow a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def _content(path: Path) -> bytes:
    """The content of a small file; empty if it is no file or too long."""
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return b""
    return path.read_bytes()


def _append(folder: Path, row: Mapping[str, Any]) -> None:
    """Append one line in one write, so that writers never mix. It begins with a newline: the last line may be cut."""
    with open(folder / OUTBOX, "ab", buffering=0, opener=_itself) as file:
        file.write(b"\n" + json.dumps(row, allow_nan=False).encode() + b"\n")


def refuse_ways_out(path: Path) -> None:
    """UserError if a file or folder to be sent is, or contains, a link, a pipe or a device."""
    inside = (Path(folder) / name for folder, *names in os.walk(path) for name in [*names[0], *names[1]])
    for each in (path, *inside):
        mode = each.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{each} is a link, or no file: only files are sent")
