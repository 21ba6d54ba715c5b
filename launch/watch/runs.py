"""The state of a run, read from its folder and from SLURM; MLflow is not asked.

A run is the `out` of any job: a training, an evaluation or a cache. Any other folder is an error of one line.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from flowmask.launch.curriculum.stages import MARK
from flowmask.launch.jobs import KINDS, TrainJob
from flowmask.launch.jobs.job import Job, RunStatus, State
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm.submission import Submission
from flowmask.models.errors import ConfigError, UserError
from flowmask.models.files import read_object
from flowmask.models.folders import locks
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.trainer.state.owner import read_end, read_start
from flowmask.trainer.state.run_folder import CHECKPOINTS, LOG

OVER: tuple[State, ...] = ("finished", "failed", "stopped", "idle")
_DEPTH = 6


def find(folders: Sequence[Path]) -> list[Path]:
    """The runs of the given folders: each folder itself, or those below it. Raises ConfigError if there is none."""
    found: dict[Path, Path] = {}
    for folder in folders:
        below = list(_below(folder, _DEPTH)) if folder.is_dir() else []
        if not below:
            what = "holds no run" if folder.is_dir() else "does not exist"
            raise ConfigError(f"{folder} {what}; give the `out` of a training, an evaluation or a cache")
        found |= {path.resolve(): path for path in below if path.resolve() not in found}
    return list(found.values())


def require_run(folder: Path) -> Path:
    """`folder`, if it is itself a run; raises ConfigError otherwise."""
    if _kind(folder) is None:
        what = "is no run" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}; give the `out` of a training, an evaluation or a cache")
    return folder


def look_at_all(folders: Sequence[Path]) -> list[RunStatus]:
    """The state of each run. A run with unreadable files reports that, and does not hide the others."""
    found = []
    for folder in folders:
        try:
            found.append(look(folder))
        except UserError as error:
            found.append(RunStatus(str(folder), TrainJob.KIND, "unknown", why=str(error)))
    return found


def look(folder: Path) -> RunStatus:
    """The state of one run. Raises UserError if one of its files is damaged."""
    kind = _kind(require_run(folder))
    assert kind is not None
    found = replace(kind.status(folder), logs=_log(folder))
    submission = _submission(folder)
    if submission is not None:
        found = _with_slurm(found, submission)
        found = replace(found, job_id=submission.slurm()[0], logs=str(submission.logs))
        if found.state not in ("running", "queued", "requeued", "unknown") and _newer_here(folder, submission):
            found = _here(replace(found, state="idle", why="", job_id=None, logs=_log(folder)), folder, kind)
    else:
        start = read_start(folder)
        found = _here(replace(found, restarts=start.restarts if start else 0), folder, kind)
    if found.state == "running" and found.step is not None and found.steps and found.step_s:
        found = replace(found, eta_s=max(0, found.steps - found.step) * found.step_s)
    return found


def _below(folder: Path, depth: int) -> Iterator[Path]:
    stages = read_object(folder / MARK).get("stages")
    if isinstance(stages, list):
        outs = [stage.get("out") for stage in stages if isinstance(stage, dict)]
        for out in outs:
            with suppress(OSError, ValueError):  # names that no file system accepts
                if isinstance(out, str) and _kind(Path(out)) is not None:
                    yield Path(out)
        return
    if _kind(folder) is not None:
        yield folder
        if not (folder / CHECKPOINTS).is_dir():
            return  # a training's evaluations may be below it
    if depth:
        try:
            children = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        except OSError:
            return
        skipped = (CHECKPOINTS, "launch", "export", "__pycache__")
        for child in map(Path, children):
            if not child.name.startswith(".") and child.name not in skipped:
                yield from _below(child, depth - 1)


def _kind(folder: Path) -> type[Job] | None:
    """The kind of job whose `out` is this folder; None if there is none."""
    if kind := next((kind for kind in KINDS.values() if kind.is_in(folder)), None):
        return kind
    submission = Submission.latest(folder)
    if submission is not None:
        try:
            return submission.kind()
        except ConfigError:
            return TrainJob  # a run of unknown kind: `look` reports the fault
    return TrainJob if read_start(folder) is not None else None


def _here(found: RunStatus, folder: Path, kind: type[Job]) -> RunStatus:
    """The state of a run that was not submitted to SLURM."""
    start, end = read_start(folder), read_end(folder)
    if found.state == "running":
        return found
    if locks.is_held(folder / kind.LOCK):
        where = f"process {start.launcher.pid} on {start.owner.host}" if start else ""
        return replace(found, state="running", why=where)
    if found.state == "finished":
        return found
    if end is None:
        if start is None:
            return replace(found, why="no process is running; the same command continues")
        if start.launcher.is_here() and not start.launcher.is_dead():
            return replace(found, state="running", why="starting, or ending")
        if start.owner.is_dead():
            return replace(
                found, state="failed", why=f"process {start.owner.pid} was killed; the same command continues"
            )
        return replace(found, state="unknown", why=f"started on {start.owner.host}: check there")
    if end.code == REQUEUE_EXIT_CODE:
        return replace(found, state="stopped", why="the same command continues")
    return replace(found, state="failed" if end.code else found.state, why=end.message)


def _with_slurm(found: RunStatus, submission: Submission) -> RunStatus:
    """The state of a submitted run: by its verdict, else the queue, else the accounting."""
    job_id, array = submission.slurm()
    ended = [attempt for attempt in submission.all_attempts() if attempt.why is not None]
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
    """The newest submission that SLURM accepted."""
    folders = sorted((folder / "launch").glob("[0-9]*"), reverse=True)
    return next((Submission(path) for path in folders if (path / "slurm.json").is_file()), None)


def _newer_here(folder: Path, submission: Submission) -> bool:
    """Whether the last start was on this machine, after that submission had ended."""
    start = read_start(folder)
    files = sorted((submission.folder / "verdict").glob("*.json"))
    path = folder / ".owner.json"
    return bool(start and files and path.stat().st_mtime > files[-1].stat().st_mtime)


def _log(folder: Path) -> str:
    return str(folder / LOG) if (folder / LOG).is_file() else ""
