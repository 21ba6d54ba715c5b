"""Leases: the heartbeat of a worker, readable on any node that sees the folder.

A lease is a file with the worker's identity and the seconds of silence after which the worker counts as dead. A thread
touches the file, so its mtime is the *filesystem's* time of the last beat. Clocks of nodes are never compared.
The worker holds a lock (flock) on the file where locks exist: it tells `flowmask stop` that the worker still runs.
"""

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flowmask.models.errors import CacheError, help_of_disk
from flowmask.models.process import DEFAULT_LEASE_S, Owner, process_here
from flowmask.models.stored.regular import open_regular

BEATS_PER_LEASE = 6
_MOST_BYTES = 1 << 16  # of a lease
WORKER = ".worker-"  # prefix of lease files
State = Literal["alive", "dead", "expired"]


def this_worker(lease_s: float) -> Owner:
    """The identity of this process."""
    return process_here(os.getpid(), lease_s=lease_s)


class Lease(BaseModel):
    """A lease as another process reads it; `owner` is None if the file cannot be understood."""

    model_config = ConfigDict(frozen=True)

    owner: Owner | None
    beat_ns: int

    @property
    def lease_s(self) -> float:
        return self.owner.lease_s if self.owner else DEFAULT_LEASE_S

    def state(self, now_ns: int) -> State:
        """The owner's state at `now_ns` of the filesystem's clock."""
        if self.owner is not None and self.owner.is_dead():
            return "dead"
        return "expired" if (now_ns - self.beat_ns) / 1e9 > self.lease_s else "alive"


def read_lease(path: Path) -> Lease | None:
    """The lease at `path` (a claim links to its owner's lease); None if there is none."""
    try:
        # open, not stat: then a network filesystem asks the server for the time
        with os.fdopen(open_regular(path), "rb") as file:
            beat_ns, content = os.fstat(file.fileno()).st_mtime_ns, file.read(_MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error.strerror}; check the filesystem") from error
    try:
        return Lease(owner=Owner.model_validate_json(content), beat_ns=beat_ns)
    except ValidationError:
        return Lease(owner=None, beat_ns=beat_ns)


class Worker:
    """This process's lease in a folder: written at the first use; a thread then touches it at every beat.

    If a beat finds no file (the build has ended, or somebody cleaned up), the thread ends but the current work
    continues: another worker makes the same bytes for the unit. The next claim writes the file and starts the thread.
    """

    def __init__(self, folder: Path, *, lease_s: float):
        self.path = folder / f"{WORKER}{secrets.token_hex(8)}"
        self.held: set[Path] = set()  # claims in use by this process
        # claims of other workers: the last heartbeat, and the time since this process knows it
        self.watched: dict[Path, tuple[Hashable, float]] = {}
        self.lock = threading.RLock()
        self._content = this_worker(lease_s).model_dump_json().encode()
        self._interval_s = lease_s / BEATS_PER_LEASE
        self._thread: threading.Thread | None = None
        self._file = -1

    def beat(self) -> int:
        """Renew the lease now; returns the filesystem's time in ns. CacheError if the folder cannot be written."""
        with self.lock:
            try:
                now = self._touch_or_write()
            except OSError as error:
                raise CacheError(
                    f"cannot write {self.path.parent}: {error.strerror}; {help_of_disk(error)}, or choose another `out`"
                ) from error
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
                self._thread.start()
            return now

    def _touch_or_write(self) -> int:
        for attempt in range(1000):  # each worker that ends may remove the folder once
            try:
                os.utime(self.path)  # without a time: the filesystem sets it
                return self.path.stat().st_mtime_ns
            except FileNotFoundError:
                try:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    _write_whole(self.path, self._content)
                    self._hold()
                except (FileNotFoundError, FileExistsError):
                    if attempt == 999:
                        raise
        raise AssertionError

    def _hold(self) -> None:
        """Lock the file while this process lives; only the command that stops a build asks for the lock."""
        with suppress(OSError):
            if self._file >= 0:
                os.close(self._file)
            self._file = -1
            self._file = os.open(self.path, os.O_RDWR)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

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
                    continue  # a temporary fault of a network filesystem; the next beat may succeed


def _write_whole(path: Path, content: bytes) -> None:
    """Write a small file, or leave no file: on a full disk even a few bytes may not fit."""
    try:
        path.write_bytes(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise


_lock = threading.Lock()
_workers: dict[tuple[int, Path, float], Worker] = {}


def worker_in(folder: Path, *, lease_s: float) -> Worker:
    """This process's worker in `folder`: the same one at every call; a forked child gets another one."""
    key = (os.getpid(), folder.absolute(), lease_s)
    with _lock:
        if key not in _workers:
            _workers[key] = Worker(folder, lease_s=lease_s)
        return _workers[key]


def filesystem_now(folder: Path) -> int:
    """The filesystem's time in ns, from a probe file in `folder`; this node's time if `folder` is not writable."""
    probe = folder / f".clock-{secrets.token_hex(8)}"
    try:
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink()
    except OSError:
        return time.time_ns()
