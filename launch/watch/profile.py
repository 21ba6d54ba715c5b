"""`flowmask profile`: request a profile of a live run's next steps, and wait until every rank has written it."""

import json
import time
from pathlib import Path

from flowmask.launch.watch.control import POLL_S
from flowmask.launch.watch.runs import OVER, look, require_run
from flowmask.models.errors import UserError
from flowmask.models.files import write_atomically
from flowmask.trainer.explain.profile import PROFILE, REQUEST
from flowmask.trainer.explain.timeline import TimeSample, aligned, read_timeline

TRACES = "rank-[0-9]*.json"


class ProfileError(UserError):
    """A run that can't be profiled now."""


def profile(run: Path, *, steps: int, timeout_s: float) -> Path:
    """The folder with each rank's trace of `steps` steps; ProfileError if the run is not alive, or too slow."""
    status = look(require_run(run))
    if status.kind != "train":
        raise ProfileError(f"{run} is a {status.kind} job; only a training can be profiled")
    if status.state != "running":
        raise ProfileError(f"{run} is {status.state}, not running; a profile is taken of steps while they are trained")
    folder = run / PROFILE
    folder.mkdir(exist_ok=True)
    before, ranks = _traces(folder), _ranks(run)
    request = folder / REQUEST
    write_atomically(request, json.dumps({"steps": steps}))
    until = time.monotonic() + timeout_s
    while len(new := {path for path, written in _traces(folder).items() if before.get(path) != written}) < ranks:
        over = look(run).state in OVER
        if over or time.monotonic() > until:
            request.unlink(missing_ok=True)
            why = "it has ended" if over else f"they were not there after {timeout_s:.0f} s"
            raise ProfileError(
                f"{run}: {len(new)} of {ranks} ranks have written a profile: {why}; --timeout-s waits longer"
            )
        time.sleep(POLL_S)
    return max(new).parent


def _traces(folder: Path) -> dict[Path, int]:
    """The existing traces with the times of their writing."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"step-*/{TRACES}")}


def _ranks(run: Path) -> int:
    """The present number of ranks of the run; ProfileError if the run has not recorded it yet."""
    try:
        turns: list[list[TimeSample]] = aligned(read_timeline(run))
    except UserError:
        turns = []
    if not turns:
        raise ProfileError(f"{run} has not come to its first line of log.txt; ask again when it has")
    return len(turns[-1])
