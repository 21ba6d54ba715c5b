"""Times one candidate: runs the job in processes, reads the rows that it writes, and ends it after enough rows.

Nothing is kept: the folder is temporary, no checkpoint is written, and nothing is sent to MLflow.
"""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flowmask.launch.jobs import TrainJob
from flowmask.launch.jobs.job import Job, Resolved
from flowmask.launch.progress import Update
from flowmask.launch.tune.here import on_this_machine
from flowmask.launch.tune.search import Changes, Timing
from flowmask.launch.tune.worker import JOB, LAUNCHER, REASON, ROWS
from flowmask.models.errors import NO_ROOM, ConfigError
from flowmask.models.process import python_module
from flowmask.models.stored.sealed import parse_json
from flowmask.trainer.state.run_folder import METRICS

_SAID = "said.txt"
_NEVER = 10**9  # no step of a trial is saved
_STEPS = 10**6  # more steps than a trial can make
_SLOWER = 1.25  # a candidate is ended early if each of its units takes more than this factor of the best one's
_MOST_UNITS = 50
_LOOK_S = 0.1


@dataclass(frozen=True)
class Pace:
    """Number of warm-up rows of a trial, and how many rows and seconds after them are enough."""

    warm_up: int
    rows: int
    seconds: float


PACES = {"train": Pace(2, 5, 3.0), "cache": Pace(1, 3, 3.0)}


class Trials:
    """Times jobs in folders below `scratch`; `update` is called with the number of rows of a candidate."""

    def __init__(self, scratch: Path, update: Update) -> None:
        self._scratch, self._update, self._count = scratch, update, 0

    def __call__(self, job: Job, changes: Changes, *, until: float, best: Timing) -> Timing:
        """until: on the monotonic clock; raises ConfigError if the given job fails for another reason than memory."""
        self._count += 1
        folder = self._scratch / f"{self._count:03d}"
        folder.mkdir()
        pace, label = PACES[job.KIND], Timing(changes).label
        processes = _start(folder, job)
        try:
            while True:
                rows = rows_of(folder, job)
                self._update(label, len(rows), pace.warm_up + pace.rows)
                if enough(rows, pace, best=best) or time.monotonic() >= until:
                    return timing_of(changes, rows, pace)
                if any(process.poll() is not None for process in processes):
                    return failed(changes, folder)
                _wait(processes)
        finally:
            _end(processes)


def enough(rows: Sequence[Mapping[str, Any]], pace: Pace, *, best: Timing) -> bool:
    """Whether the rows suffice for a time, or show that it is not below that of `best` (on the same examples)."""
    measured = _seconds(rows, pace)
    pairs = list(zip(measured, best.seconds))
    if len(pairs) > pace.rows // 2 and all(own > _SLOWER * its for own, its in pairs):
        return True
    return len(measured) >= pace.rows and (sum(measured) >= pace.seconds or len(measured) >= _MOST_UNITS)


def timing_of(changes: Changes, rows: Sequence[Mapping[str, Any]], pace: Pace) -> Timing:
    """The median of the rows after the warm-up; no time if there are too few."""
    measured = _seconds(rows, pace)
    if len(measured) <= pace.rows // 2:
        return Timing(changes, said="the time was over")
    waited = sum(row["step_s"] * row.get("data_wait_pct", 0) / 100 for row in rows[pace.warm_up :])
    held = [row["device_memory_peak_gib"] for row in rows if "device_memory_peak_gib" in row]
    share = waited / sum(measured)
    return Timing(changes, statistics.median(measured), tuple(measured), share, max(held, default=None))


def _seconds(rows: Sequence[Mapping[str, Any]], pace: Pace) -> list[float]:
    return [row["step_s"] for row in rows[pace.warm_up :]]


def trial_of(job: Job, folder: Path) -> Resolved:
    """The job as a trial in `folder`: the same work on this machine, but nothing is saved, evaluated or sent."""
    resolved: Resolved = on_this_machine(job).model_copy(update={"out": folder / "run"}).model_dump(mode="json")
    if isinstance(job, TrainJob):
        resolved["train"] |= {"steps": _STEPS, "epochs": None, "log_every_steps": 1}
        resolved |= {"checkpoint": {"every_steps": _NEVER}, "evaluate": {}, "tracking": {"enabled": False}}
    return resolved


def _start(folder: Path, job: Job) -> list[subprocess.Popen[bytes]]:
    """The launcher of a training's ranks, or the workers of a build, each with its folder."""
    resolved = trial_of(job, folder)
    workers = 1 if isinstance(job, TrainJob) else resolved["launch"]["processes_per_node"]
    started = []
    for worker in range(workers):
        place = folder / str(worker)
        place.mkdir()
        (place / JOB).write_text(json.dumps({"kind": job.KIND, "config": resolved}))
        environment = os.environ | {LAUNCHER: str(os.getpid())}
        if not isinstance(job, TrainJob):
            environment |= {"LOCAL_RANK": str(worker), "LOCAL_WORLD_SIZE": str(workers)}
        with (place / _SAID).open("wb") as said:
            command = python_module("flowmask.launch.tune.worker", place)
            # In a new session, like ranks: ^C reaches only the process that measures.
            started.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
                )
            )
    return started


def rows_of(folder: Path, job: Job) -> list[dict[str, Any]]:
    """The rows of a trial so far; for a build, those of its first worker."""
    return read_rows(folder / "run" / METRICS if isinstance(job, TrainJob) else folder / "0" / ROWS)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a file that may still grow, or be missing."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [row for line in lines if isinstance(row := parse_json(line), dict)]


def failed(changes: Changes, folder: Path) -> Timing:
    """The result of a candidate that ended by itself. If the given job fails for another reason than memory, raise."""
    reasons = [path.read_text() for path in sorted(folder.glob(f"*/{REASON}"))]
    said = [path.read_text(errors="replace").strip().splitlines()[-1:] for path in sorted(folder.glob(f"*/{_SAID}"))]
    reason = next(iter(reasons), "") or next((line[0] for line in said if line), "its processes ended without output")
    if NO_ROOM in reason or "SIGKILL" in reason:
        return Timing(changes, said=f"does not fit: {reason}", no_room=True)
    if not changes:
        raise ConfigError(reason)
    return Timing(changes, said=f"failed: {reason}")


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    try:
        processes[0].wait(timeout=_LOOK_S)
    except subprocess.TimeoutExpired:
        return


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill them and their ranks, and wait for their end: the next candidate needs their memory."""
    running = [psutil.Process(process.pid) for process in processes if process.poll() is None]
    ranks = [rank for process in running for rank in process.children(recursive=True)]
    for process in processes:
        process.kill()
        process.wait()
    for rank in psutil.wait_procs(ranks, timeout=10)[1]:
        rank.kill()
        rank.wait()
