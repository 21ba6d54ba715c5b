"""Starts the ranks of a job on this machine, passes signals on, and ends all of them.

The kernel kills a rank as soon as its launcher ends (PR_SET_PDEATHSIG), also after kill -9. A rank
that fails ends the others, which would otherwise wait for it in a collective without end.
"""

import contextlib
import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from flowmask.launch.console import err
from flowmask.launch.jobs import KINDS
from flowmask.models.errors import UserError
from flowmask.models.folders import locks
from flowmask.models.process import MISTAKE_EXIT_CODE, REQUEUE_EXIT_CODE, STOP_SIGNALS, python_module, stop_signals

PR_SET_PDEATHSIG = 1
GRACE_S = (
    600.0  # for the other ranks to end after the first: the machine may be busy, and rank 0 still sends data to MLflow
)
_WHY = {  # signals that FlowMask does not send, and their usual cause
    signal.SIGKILL: "often by the kernel, out of memory: see dmesg, or memory.events of the job's cgroup",
    signal.SIGABRT: "a library aborted, as NCCL does when another rank does not answer for "
    "train.collective_timeout_s: look for the rank that hung or died",
    signal.SIGBUS: "often a full /dev/shm, or a file that was truncated while it was read",
    signal.SIGSEGV: "a crash in compiled code",
    signal.SIGILL: "compiled code for another CPU",
}


class JobFailedError(UserError):
    """A rank failed with an error that is not a user error. Its output is above."""

    def __init__(self, what: str, traceback: str = "") -> None:
        super().__init__(f"{what}; its output is above")
        self.what, self.traceback = what, traceback


class TooLateError(UserError):
    """Ranks that were asked to stop did not save in time and were killed."""


@dataclass(frozen=True)
class Group:
    """The ranks of a job on this machine, and the rendezvous of all ranks.

    meet: ADDRESS:PORT; "" if all ranks are on this machine and meet through a file. listener: socket of rank 0 that
    already listens there. time_to_stop_s: called once when a signal comes; returns the seconds that the ranks have,
    or None for no limit.
    """

    first_rank: int
    world: int
    meet: str = ""
    listener: socket.socket | None = None
    time_to_stop_s: Callable[[], float | None] = lambda: None


def run_local(kind: str, resolved: dict[str, Any], *, processes: int, group: Group | None = None) -> int:
    """Run one job in `processes` ranks and wait; returns 0, or the exit code that requests a requeue.

    resolved: the whole config as plain data; group: None if these ranks are the whole job.
    Raises the rank's own UserError, or JobFailedError if a rank crashed.
    """
    independent = KINDS[kind].INDEPENDENT
    group = group or Group(0, processes)
    with tempfile.TemporaryDirectory(prefix="flowmask-") as scratch:
        folder = Path(scratch)
        if processes > 1 and not group.meet and not independent and (lock := locks.take(folder / "lock")):
            os.close(lock)  # the rendezvous file needs locks
        err.print(f"{kind}: starting {processes} process{'es' * (processes > 1)}")  # their imports take seconds
        (folder / "job.json").write_text(json.dumps({"kind": kind, "config": resolved}))
        ranks = [_start(folder, rank, processes, group=group) for rank in range(processes)]
        if group.listener is not None:
            group.listener.close()  # rank 0 has its own copy: after its end no process may seem to listen
        signals: list[int] = []
        previous = {number: signal.signal(number, _forward_to(ranks, signals)) for number in stop_signals()}
        try:
            codes = _wait(ranks, signals, group, independent=independent)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            _kill(ranks)
        if independent and 0 in codes:
            return 0  # a rank ends with 0 only when all work is done, also that of lost ranks
        return _verdict(folder, codes)


def die_with_parent(parent: int) -> None:
    """Called first in a rank: the kernel ends it when `parent` ends, or at once if that has already ended."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _start(folder: Path, rank: int, processes: int, *, group: Group) -> subprocess.Popen[bytes]:
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    environment = os.environ | {
        "RANK": str(group.first_rank + rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(group.world),
        "LOCAL_WORLD_SIZE": str(processes),
        "FLOWMASK_MEET": group.meet or str(folder / "meet"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "FLOWMASK_PARENT": str(os.getpid()),
    }
    handed: tuple[int, ...] = ()
    if group.listener is not None and rank == group.first_rank == 0:
        handed = (group.listener.fileno(),)
        environment["FLOWMASK_LISTENER"] = str(handed[0])
    # In a new session: a terminal's ^C reaches only the launcher, which forwards it once.
    command = python_module("flowmask.launch.local.worker", folder)
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=handed)


def _forward_to(ranks: list[subprocess.Popen[bytes]], signals: list[int]) -> Any:
    def handler(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    return handler


def _wait(
    ranks: list[subprocess.Popen[bytes]], signals: list[int], group: Group, *, independent: bool
) -> list[int | None]:
    """Wait for all ranks. One failure ends the rest at once; after one success the rest have a grace period.

    independent: only a user error ends the rest, because all ranks would hit it; after a crash the rest take over.
    """
    deadline: float | None = None
    stop_by: float | None = None
    while True:
        if signals and stop_by is None:
            within_s = group.time_to_stop_s()
            stop_by = math.inf if within_s is None else time.monotonic() + within_s
        if stop_by is not None and time.monotonic() > stop_by:
            raise TooLateError("the ranks did not save in time; the previous checkpoint is unchanged")
        codes = [rank.poll() for rank in ranks]
        ended = [code for code in codes if code is not None]
        failed = [code for code in ended if _is_failure(code)]
        if len(ended) == len(ranks) or (MISTAKE_EXIT_CODE in failed if independent else failed):
            return codes
        if len(ended) > len(failed) and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return codes
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks[codes.index(None)].wait(timeout=0.2)


def _is_failure(code: int) -> bool:
    return code not in (0, REQUEUE_EXIT_CODE)


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()


def _verdict(folder: Path, codes: list[int | None]) -> int:
    errors = sorted(folder.glob("error_*.txt"))
    if errors:
        raise UserError(errors[0].read_text())
    if any(code is not None and -code in STOP_SIGNALS for code in codes):
        return REQUEUE_EXIT_CODE  # asked to stop before it handled signals: there is nothing to save yet
    crashes = sorted(folder.glob("crash_*.txt"))
    traceback = crashes[0].read_text() if crashes else ""
    lost = sorted(folder.glob("lost_*.txt"))  # these only noticed that another rank was gone: report that one
    for rank, code in enumerate(codes):
        if code is not None and _is_failure(code) and not any(f"_{rank:05d}" in file.stem for file in lost):
            raise JobFailedError(f"rank {rank} {_how(code)}", traceback)
    if lost:
        raise JobFailedError(lost[0].read_text())
    if None in codes:
        late = codes.index(None)
        raise JobFailedError(f"rank {late} did not end within {GRACE_S:.0f} s after the others and was killed")
    return max(code or 0 for code in codes)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    why = _WHY.get(signal.Signals(-code))
    return f"was killed by {signal.Signals(-code).name}" + (f" ({why})" if why else "")
