"""How a run is getting on, read from its folder and from SLURM; what MLflow knows is not asked.

A run is the `out` of any job: a training, an evaluation or a cache. What is not one is refused in one line.
"""

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from flowmask.launch.curriculum.stages import MARK
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm.submission import Submission
from flowmask.models.errors import ConfigError, UserError
from flowmask.trainer.config import REQUEUE_EXIT_CODE
from flowmask.trainer.state import locks
from flowmask.trainer.state.owner import read_end, read_start
from flowmask.trainer.state.run_folder import CHECKPOINTS, CONFIG, LOG, METRICS

State = Literal["running", "queued", "requeued", "finished", "failed", "stopped", "idle", "unknown"]
Kind = Literal["train", "evaluate", "cache"]
OVER: tuple[State, ...] = ("finished", "failed", "stopped", "idle")
_TAIL_BYTES = 1 << 16
_RATE_ROWS = 50
_DEPTH = 6


@dataclass(frozen=True)
class RunStatus:
    """A run at this moment. step_s: median seconds of a step; `steps` are clips of a cache, videos of an evaluation."""

    folder: str
    kind: Kind
    state: State
    why: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    step_s: float | None = None
    eta_s: float | None = None
    restarts: int = 0
    job_id: str | None = None
    logs: str = ""


def find(folders: Sequence[Path]) -> list[Path]:
    """The runs that are meant: each folder itself, or those below it; ConfigError for one that holds none."""
    found: dict[Path, Path] = {}
    for folder in folders:
        below = list(_below(folder, _DEPTH)) if folder.is_dir() else []
        if not below:
            what = "holds no run" if folder.is_dir() else "does not exist"
            raise ConfigError(f"{folder} {what}; give the `out` of a training, an evaluation or a cache")
        found |= {path.resolve(): path for path in below if path.resolve() not in found}
    return list(found.values())


def require_run(folder: Path) -> Path:
    """`folder`, if it is itself a run; ConfigError in one line otherwise."""
    if _kind(folder) is None:
        what = "is no run" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}; give the `out` of a training, an evaluation or a cache")
    return folder


def look(folder: Path) -> RunStatus:
    """The state of one run."""
    kind = _kind(require_run(folder))
    assert kind is not None
    found = _progress(folder, kind)
    submission = _submission(folder)
    start = read_start(folder)
    if submission is not None:
        found = _with_slurm(found, submission)
        found = replace(found, job_id=submission.slurm()[0], logs=str(submission.logs))
        if found.state not in ("running", "queued", "requeued", "unknown") and _newer_here(folder, submission):
            found = _here(replace(found, state="idle", why="", job_id=None, logs=_log(folder)), folder)
    else:
        found = _here(found, folder)
        found = replace(found, restarts=start.number - 1 if start else 0)
    if found.state == "running" and found.step is not None and found.steps and found.step_s:
        found = replace(found, eta_s=max(0, found.steps - found.step) * found.step_s)
    return found


def _below(folder: Path, depth: int) -> Iterator[Path]:
    stages = _json(folder / MARK).get("stages")
    if isinstance(stages, list):
        yield from (path for stage in stages if _kind(path := Path(stage["out"])) is not None)
        return
    if _kind(folder) is not None:
        yield folder
        if not (folder / CHECKPOINTS).is_dir():
            return  # below a training there may be its evaluations
    if depth:
        try:
            children = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        except OSError:
            return
        skipped = (CHECKPOINTS, "launch", "export", "__pycache__")
        for child in map(Path, children):
            if not child.name.startswith(".") and child.name not in skipped:
                yield from _below(child, depth - 1)


def _kind(folder: Path) -> Kind | None:
    """What job's `out` a folder is; None if of none."""
    if (folder / CHECKPOINTS).is_dir() or (folder / METRICS).is_file():
        return "train"
    if (folder / "scores.json").is_file() or (folder / ".evaluate").is_dir():
        return "evaluate"
    if (folder / "plan" / "plan.json").is_file() or (folder / "work" / "claims").is_dir():
        return "cache"
    submission = Submission.latest(folder)
    if submission is not None:
        kind = submission.job()[0]
        return kind if kind in ("train", "evaluate", "cache") else None  # type: ignore[return-value]
    return "train" if read_start(folder) is not None else None


def _progress(folder: Path, kind: Kind) -> RunStatus:
    """How far a run is, by its own files; state "idle" until somebody says otherwise."""
    base = RunStatus(str(folder), kind, "idle", logs=_log(folder))
    if kind == "train":
        return _of_training(folder, base)
    if kind == "cache":
        return _of_cache(folder, base)
    records = sum(1 for _ in folder.glob(".evaluate/*/records/*.json"))
    scores = _json(folder / "scores.json")
    if scores and not records:
        return replace(base, state="finished", step=scores.get("videos"), steps=scores.get("videos"))
    return replace(base, step=records)


def _of_training(folder: Path, base: RunStatus) -> RunStatus:
    rows = _last_rows(folder / METRICS)
    steps = _steps(folder)
    step = int(rows[-1]["step"]) if rows else 0
    times = [row["time"] for row in rows if "time" in row]
    took = [after - before for before, after in pairwise(times) if after > before]
    losses = [row["loss"] for row in rows[-10:] if isinstance(row.get("loss"), int | float)]
    return replace(
        base,
        state="finished" if steps is not None and _saved_step(folder) >= steps else "idle",
        step=step,
        steps=steps,
        loss=sum(losses) / len(losses) if losses else None,
        step_s=statistics.median(took) if took else None,
    )


def _of_cache(folder: Path, base: RunStatus) -> RunStatus:
    from flowmask.data_pipeline.build.status import status

    try:
        found = status(folder)
    except UserError:
        return base
    state: State = "finished" if found.phase == "complete" else "running" if found.workers_alive else "idle"
    clips = found.clips
    return replace(
        base,
        state=state,
        why="" if state == "finished" else found.phase,
        step=clips.done if clips else None,
        steps=clips.total if clips else None,
        step_s=1 / found.rate_per_s if found.rate_per_s and found.phase == "clips" else None,
    )


def _here(found: RunStatus, folder: Path) -> RunStatus:
    """The state of a run that SLURM does not know."""
    start, end = read_start(folder), read_end(folder)
    if found.kind == "cache" and found.state != "idle":
        return found
    if locks.is_held(folder / ".lock") or locks.is_held(folder / ".evaluate" / "rank_0.lock"):
        where = f"process {start.launcher.pid} on {start.owner.host}" if start else ""
        return replace(found, state="running", why=where)
    if found.state == "finished":
        return found
    if end is None:
        if start is None:
            return replace(found, why="nobody works on it; the same command goes on")
        if start.launcher.is_here() and not start.launcher.is_dead():
            return replace(found, state="running", why="starting, or ending")
        if start.owner.is_dead():
            return replace(found, state="failed", why=f"process {start.owner.pid} was killed; the same command goes on")
        return replace(found, state="unknown", why=f"started on {start.owner.host}: look there")
    if end.code == REQUEUE_EXIT_CODE:
        return replace(found, state="stopped", why="the same command goes on")
    return replace(found, state="failed" if end.code else found.state, why=end.message)


def _with_slurm(found: RunStatus, submission: Submission) -> RunStatus:
    """The state of a run that was submitted, by its verdict, else by the queue, else by the accounting."""
    job_id, array = submission.slurm()
    attempts = [attempt for task in range(array) for attempt in submission.attempts(array=task)]
    ended = [attempt for attempt in attempts if attempt.why is not None]
    found = replace(found, restarts=len(ended))
    verdicts = submission.verdicts()
    if len(verdicts) == array:
        found = replace(found, restarts=max(0, len(ended) - array))
        worst = next((verdict for verdict in verdicts.values() if verdict.code), None)
        if worst is None or found.state == "finished":
            return replace(found, state="finished", why="")
        state: State = "stopped" if worst.why in ("stopped", "cancelled") else "failed"
        return replace(found, state=state, why=worst.message)
    try:
        rows = slurm_commands.queued(job_id)
    except ConfigError as error:
        return replace(found, state="unknown", why=str(error))
    if not rows:
        states = slurm_commands.final_states(job_id)
        last = states[-1] if states else "nothing"
        cancelled: State = "stopped" if last.startswith("CANCELLED") else "failed"
        return found if found.state == "finished" else replace(found, state=cancelled, why=f"SLURM says {last}")
    if any(state == "RUNNING" for state, _ in rows.values()):
        running = sum(1 for state, _ in rows.values() if state == "RUNNING")
        return replace(found, state="running", why=f"{running} of {array} tasks" if array > 1 else "")
    reason = next(iter(rows.values()))[1]
    if ended:
        return replace(found, state="requeued", why=f"{ended[-1].why}: {ended[-1].message}; waits: {reason}")
    return replace(found, state="queued", why=reason)


def _submission(folder: Path) -> Submission | None:
    """The newest submission that SLURM took."""
    folders = sorted((folder / "launch").glob("[0-9]*"), reverse=True)
    return next((Submission(path) for path in folders if (path / "slurm.json").is_file()), None)


def _newer_here(folder: Path, submission: Submission) -> bool:
    """Whether the last start was on this machine and not by that submission, which has ended."""
    start = read_start(folder)
    files = sorted((submission.folder / "verdict").glob("*.json"))
    path = folder / ".owner.json"
    return bool(start and files and path.stat().st_mtime > files[-1].stat().st_mtime)


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The last whole rows of a metrics file, the newest last."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    whole = lines[1:-1] if size > _TAIL_BYTES else lines[:-1]
    found = []
    for line in whole[-_RATE_ROWS:]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found


def _steps(folder: Path) -> int | None:
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
        return int(config["train"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _saved_step(folder: Path) -> int:
    latest = folder / CHECKPOINTS / "latest"
    name = latest.readlink().name if latest.is_symlink() else ""
    return int(name.removeprefix("step_")) if name.removeprefix("step_").isdigit() else 0


def _log(folder: Path) -> str:
    return str(folder / LOG) if (folder / LOG).is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
