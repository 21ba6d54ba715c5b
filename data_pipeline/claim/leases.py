"""Leases: a worker's sign of life, to be judged from any node that sees the folder.

A lease is a file that names its worker and how long its silence is to be borne; a thread touches it, so that its
mtime is the *filesystem's* time of the last beat. No node's clock is ever compared with another's.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowmask.models.errors import CacheError

DEFAULT_LEASE_S = 120.0
BEATS_PER_LEASE = 6
WORKER = ".worker-"  # prefix of lease files
State = Literal["alive", "dead", "expired"]


class TakenOverError(CacheError):
    """A unit that we were slow at has another owner, who cleared our half away: theirs will do."""


class Owner(BaseModel):
    """Who holds a lease: enough to know on the same host, and only there, whether that process still runs."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: str
    machine: str  # /etc/machine-id: hosts of one name are not one host
    boot: str  # of this start of the kernel; "" where the system has none, then nothing is known of other processes
    namespace: str  # in another one (a container) the same pid is another process
    pid: int = Field(gt=0, lt=2**31)
    started: int  # clock ticks after boot: tells a process from a later one of the same pid
    lease_s: float = Field(gt=0)

    def is_here(self) -> bool:
        """True if it is, or was, a process of this host and pid namespace."""
        here = _here()
        return bool(here.boot) and (self.boot, self.namespace) == (here.boot, here.namespace)

    def is_dead(self) -> bool:
        """True if surely ended; False if alive, or not for this host to say."""
        here = _here()
        if not here.boot or self.namespace != here.namespace:
            return False
        if self.boot != here.boot:  # this very host, and it was started again since
            return bool(here.machine) and (self.host, self.machine) == (here.host, here.machine)
        try:
            os.kill(self.pid, 0)  # unlike /proc, right also where other users' processes are hidden
        except ProcessLookupError:
            return True
        except OSError:
            pass
        process = _process(self.pid)
        return process is not None and (process[0] in "ZXx" or process[1] != self.started)


def this_worker(lease_s: float) -> Owner:
    """The identity of this process."""
    return process_here(os.getpid(), lease_s=lease_s)


def process_here(pid: int, *, lease_s: float = DEFAULT_LEASE_S) -> Owner:
    """The identity of a process of this host and pid namespace."""
    process = _process(pid)
    started = process[1] if process else 0
    return _here().model_copy(update={"pid": pid, "started": started, "lease_s": lease_s})


@cache
def _here() -> Owner:
    """This host and pid namespace; the process is filled in by `this_worker`."""
    return Owner(
        host=socket.gethostname(),
        machine=_first_line("/etc/machine-id"),
        boot=_first_line("/proc/sys/kernel/random/boot_id"),
        namespace=_link("/proc/self/ns/pid"),
        pid=1,
        started=0,
        lease_s=DEFAULT_LEASE_S,
    )


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 - "pid:[4026531836]" is no path
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process of this namespace; None if /proc does not show it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


class Lease(BaseModel):
    """A lease as somebody else reads it; `owner` is None if the file says nothing that we understand."""

    model_config = ConfigDict(frozen=True)

    owner: Owner | None
    beat_ns: int

    @property
    def lease_s(self) -> float:
        return self.owner.lease_s if self.owner else DEFAULT_LEASE_S

    def state(self, now_ns: int) -> State:
        """What is to be thought of its owner at `now_ns` of the filesystem's clock."""
        if self.owner is not None and self.owner.is_dead():
            return "dead"
        return "expired" if (now_ns - self.beat_ns) / 1e9 > self.lease_s else "alive"


def read_lease(path: Path) -> Lease | None:
    """The lease at `path` (a claim leads to its owner's); None if there is none."""
    try:
        with path.open(
            "rb"
        ) as file:  # open, not stat: a network filesystem then asks the server for the time
            beat_ns, content = os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error.strerror}; check the filesystem") from error
    try:
        return Lease(owner=Owner.model_validate_json(content), beat_ns=beat_ns)
    except ValidationError:
        return Lease(owner=None, beat_ns=beat_ns)


class Worker:
    """This process's own lease in a folder: written when first needed, beaten by a thread from then on.

    A beat that finds the file gone (the build has ended, or somebody cleaned up) ends the thread; the work in hand
    goes on, since whatever another worker makes of the same unit has the same bytes. The next claim starts both anew.
    """

    def __init__(self, folder: Path, *, lease_s: float):
        self.path = folder / f"{WORKER}{secrets.token_hex(8)}"
        self.held: set[Path] = set()  # claims in use by this process
        self.watched: dict[
            Path, tuple[Hashable, float]
        ] = {}  # claims of others: last sign of life, seen since
        self.lock = threading.RLock()
        self._content = this_worker(lease_s).model_dump_json().encode()
        self._interval_s = lease_s / BEATS_PER_LEASE
        self._thread: threading.Thread | None = None

    def beat(self) -> int:
        """Renew the lease now; returns the filesystem's time in ns. CacheError if the folder cannot be written."""
        with self.lock:
            try:
                now = self._touch_or_write()
            except OSError as error:
                raise CacheError(
                    f"cannot write {self.path.parent}: {error.strerror}; make room, or choose another `out`"
                ) from error
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
                self._thread.start()
            return now

    def _touch_or_write(self) -> int:
        for attempt in range(1000):  # workers that end just now may remove the folder, each of them once
            try:
                os.utime(self.path)  # without a time: the filesystem sets its own
                return self.path.stat().st_mtime_ns
            except FileNotFoundError:
                try:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    _write_whole(self.path, self._content)
                except (FileNotFoundError, FileExistsError):
                    if attempt == 999:
                        raise
        raise AssertionError

    def _keep_beating(self) -> None:
        while True:
            time.sleep(self._interval_s)
            with self.lock:
                try:
                    os.utime(self.path)
                except FileNotFoundError:
                    self._thread = None
                    return
                except OSError:
                    continue  # a network filesystem that stumbles; the next beat may succeed


def _write_whole(path: Path, content: bytes) -> None:
    """Write a small file, or leave none: on a full disk even a few bytes may not fit."""
    try:
        path.write_bytes(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise


_lock = threading.Lock()
_workers: dict[tuple[int, Path, float], Worker] = {}


def worker_in(folder: Path, *, lease_s: float) -> Worker:
    """This process's worker in `folder`; the same one at every call, another one in a forked child."""
    key = (os.getpid(), folder.absolute(), lease_s)
    with _lock:
        if key not in _workers:
            _workers[key] = Worker(folder, lease_s=lease_s)
        return _workers[key]


def filesystem_now(folder: Path) -> int:
    """The filesystem's time in ns, from a file made in `folder` for that; this node's where it may not be written."""
    probe = folder / f".clock-{secrets.token_hex(8)}"
    try:
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink()
    except OSError:
        return time.time_ns()
