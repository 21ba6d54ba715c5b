"""`flowmask status`, `logs` and `stop` output and actions.

A stop is requested, never forced: a training saves at its next step and ends for good. A process gets a signal only
if it is certainly the one named in the run's folder: it must hold the lock of the folder.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import typer

from flowmask.launch.config import validate
from flowmask.launch.console import out as console
from flowmask.launch.jobs import KINDS
from flowmask.launch.jobs.job import RunStatus
from flowmask.launch.next_steps import NEXT, SAME, say_next
from flowmask.launch.progress import duration
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm.requeue import STOP_FILE
from flowmask.launch.slurm.submission import Submission, Verdict
from flowmask.launch.watch.runs import OVER, find, look, look_at_all, require_run
from flowmask.models.errors import UserError
from flowmask.models.folders import locks
from flowmask.models.process import REQUEUE_EXIT_CODE, Owner
from flowmask.models.safe.words import printable
from flowmask.trainer.state.owner import read_start

POLL_S = 0.5
QUEUE_EVERY_S = 3.0
STEPS_TO_HEAR = 3  # a signal before the job handles it is lost; a second one during its end would cut the save short
_COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "queued": "yellow", "requeued": "yellow"}


class StopError(UserError):
    """A run that can't be stopped from here, or did not stop in time."""


def show_status(folders: Sequence[Path], *, as_json: bool) -> None:
    """Print the state of every run in `folders`, or below them."""
    found = look_at_all(find(folders))
    if as_json:
        typer.echo(json.dumps([asdict(status) for status in found]))
        return
    for status in found:
        console.print(printable(status.folder), style="bold", end="  ")
        console.print(status.state, style=_COLOURS.get(status.state), end="")
        console.print(printable("".join(f"  {part}" for part in _parts(status))))
        for line in (status.why, f"logs: {status.logs}" if status.logs else ""):
            if line:
                console.print(f"    {printable(line)}")
    if failed := [status.folder for status in found if status.state == "failed"]:
        say_next(NEXT["status"], failed[0])


def _parts(status: RunStatus) -> Iterator[str]:
    what = KINDS[status.kind].COUNTS
    if status.step is not None:
        yield f"{what} {status.step}" + (f"/{status.steps}" if status.steps is not None else "")
    if status.loss is not None:
        yield f"loss {status.loss:.5f}"
    if status.step_s is not None and status.state not in ("finished", "stopped"):
        yield f"{status.step_s:.3g} s a {what}"
    if status.eta_s is not None:
        yield f"{duration(status.eta_s)} left"
    if status.restarts:
        yield f"{status.restarts} restart{'s' * (status.restarts != 1)}"
    if status.job_id is not None:
        yield f"job {status.job_id}"


def show_logs(folder: Path, *, rank: int | None, lines: int, follow: bool) -> None:
    """Print the last lines of a run's log, or of one rank's output; with `follow`, continue until the run has ended."""
    require_run(folder)
    path = _log_of(folder, rank)
    with path.open("rb") as file:
        content = file.read()
        _show(b"".join(content.splitlines(keepends=True)[-lines:]))
        asked = time.monotonic()
        while follow:
            new = file.read()
            if new:
                _show(new)
                continue
            if time.monotonic() - asked > QUEUE_EVERY_S:
                asked = time.monotonic()
                follow = look(folder).state not in OVER
            time.sleep(POLL_S)


def _show(content: bytes) -> None:
    """Print lines without terminal control sequences: a log may hold any program's output."""
    text = content.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    typer.echo(printable(text, keep="\n\t"), nl=False)


def _log_of(folder: Path, rank: int | None) -> Path:
    status = look(folder)
    log = folder / "log.txt"
    if rank is None and log.is_file() and status.state != "failed":
        return log
    if status.job_id is None:
        if rank or not log.is_file():
            which = f"of rank {rank} " if rank else ""
            raise UserError(
                f"{folder}: no log {which}is kept of a job on this machine, which prints to its terminal; "
                "rank 0 of a training has log.txt"
            )
        return log
    return _task_log(Submission(Path(status.logs).parent), rank or 0)


def _task_log(submission: Submission, rank: int) -> Path:
    """The file with the output of a rank's task; all ranks of a node share one file."""
    kind, config = submission.job()
    launch = validate(config, KINDS[kind], origin=str(submission.folder / "job.json")).launch
    a_task = launch.nodes * launch.processes_per_node
    world = launch.array * a_task
    if not 0 <= rank < world:
        raise UserError(f"--rank is {rank}; the job has ranks 0 to {world - 1}")
    array, node = rank // a_task, rank % a_task // launch.processes_per_node
    job_id = submission.slurm()[0] + (f"_{array}" if launch.array > 1 else "")
    path = submission.logs / f"{job_id}_{node}_log.err"
    if not path.is_file():
        raise UserError(f"{path} does not exist: the job has not started; see flowmask status {submission.out}")
    return path


def stop(folder: Path, *, timeout_s: float, wait: bool) -> None:
    """Ask a run to save and end for good. StopError if it can't be asked from here, or does not end in time."""
    status = look(require_run(folder))
    if status.state in OVER:
        console.print(f"{folder} is {status.state}; nothing to stop")
        return
    ask = _asker(folder, status)
    until = time.monotonic() + timeout_s
    if not ask():
        raise StopError(
            f"{folder}: the process that it names is not yours, or does not hold its lock, and was not stopped; "
            "end it yourself if you know it"
        )
    asked_at = status.step or 0
    if not wait:
        console.print(f"{folder} was asked to stop; see flowmask status {folder}")
        return
    while (status := look(folder)).state not in OVER:
        heard = (status.step or 0) < asked_at + STEPS_TO_HEAR
        if status.state in ("queued", "requeued") or not heard:
            ask()
            asked_at = status.step or 0
        if time.monotonic() > until:
            raise StopError(
                f"{folder} has not stopped in {timeout_s:.0f} s (it is {status.state}); it stops at its next step, or "
                "end it with scancel or kill"
            )
        time.sleep(POLL_S if status.job_id is None else QUEUE_EVERY_S)
    console.print(f"{folder} is {status.state}" + (f" at step {status.step}" if KINDS[status.kind].SAVES else ""))
    if status.state == "stopped":
        say_next(SAME)


def _asker(folder: Path, status: RunStatus) -> Callable[[], bool]:
    """The function that asks this run to stop; it returns whether it certainly asked this run."""
    if status.job_id is not None:
        submission = Submission(Path(status.logs).parent)
        (submission.folder / STOP_FILE).touch()
        return lambda: _ask_slurm(submission)
    if KINDS[status.kind].INDEPENDENT:
        return lambda: _signal_workers(folder)
    start = read_start(folder)
    if start is None:
        raise StopError(f"{folder} does not name the process that works there; end that process yourself")
    return lambda: _signal(start.owner, folder, lock=folder / KINDS[status.kind].LOCK)


def _ask_slurm(submission: Submission) -> bool:
    """Cancel waiting tasks and ask running ones to save; the stop file prevents a requeue."""
    job_id, array = submission.slurm()
    slurm_commands.cancel_waiting(job_id, logs=submission.logs)
    rows = slurm_commands.queued(job_id)
    if any(state == "RUNNING" for state, _ in rows.values()):
        slurm_commands.ask_to_stop(job_id, logs=submission.logs)
    elif not rows:
        for task in set(range(array)) - set(submission.verdicts()):
            verdict = Verdict(REQUEUE_EXIT_CODE, "stopped", "stopped while it waited in the queue")
            submission.set_verdict(verdict, array=task)
    return True


def _signal(owner: Owner, folder: Path, *, lock: Path) -> bool:
    """Send SIGTERM to the process that holds the run's `lock`; its ranks stop together at the next step.

    Returns False, and sends nothing, if the named process lives but can't be proved to be this run.
    """
    if not owner.is_here():
        raise StopError(f"{folder} runs on {owner.host}; run flowmask stop there")
    try:
        handle = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        return True
    try:
        if owner.is_dead():
            return True
        if not locks.is_held_by(owner.pid, lock):  # the handle refers to this process for good
            return False
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGTERM)
    finally:
        os.close(handle)
    return True


def _signal_workers(folder: Path) -> bool:
    """Send SIGTERM to every worker of a build on this machine; the next build redoes unfinished units."""
    from flowmask.data_pipeline.claim.leases import WORKER, read_lease

    asked = []
    for path in (folder / "work" / "claims").glob(f"{WORKER}*"):
        lease = read_lease(path)
        if lease is not None and lease.owner is not None:
            asked.append(_signal(lease.owner, folder, lock=path))
    return all(asked)
