"""Locks on folders, which the kernel releases when their holder dies for any reason (flock).

Checking a lock holds it for an instant, so taking one waits longer than that. Only users who may write the folder
may open its lock. (The kernel lets anybody lock a file that they may read, so a reader could keep a writer out.)
"""

import errno
import fcntl
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path

import psutil

from flowmask.models.errors import UserError

GLANCE_S = 1.0  # longer than a check of the lock
_POLL_S = 0.05
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class LockError(UserError):
    """A file system without locks cannot protect a folder."""


def take(path: Path, *, patience_s: float = GLANCE_S) -> int | None:
    """Lock `path`, created if missing; returns the open file, which holds the lock until it is closed, or None.

    LockError on a file system without flock: two writers at once would destroy both results.
    """
    mode = 0o660 if path.parent.stat().st_mode & 0o020 else 0o600
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode)
    with suppress(PermissionError):  # another member of the group made it
        os.fchmod(handle, mode)  # older files may be readable by all users
    deadline = time.monotonic() + patience_s
    try:
        while not _taken(handle, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                os.close(handle)
                return None
            time.sleep(_POLL_S)
    except OSError as error:
        os.close(handle)
        if error.errno not in _NO_LOCKS:
            raise
        raise LockError(
            f"{path} can't be locked ({str(error.strerror).lower()}): {_file_system(path)} has no flock; use a folder "
            "(out, TMPDIR) on another file system, or have it mounted with locks (Lustre: -o flock)"
        ) from error
    return handle


def is_held(path: Path) -> bool:
    """Whether `path` is locked now."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _taken(handle, fcntl.LOCK_SH)
    except OSError:  # without locks, none is held
        return False
    finally:
        os.close(handle)


def is_free(path: Path) -> bool:
    """Whether `path` is certainly not locked now; False on a file system without locks."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return _taken(handle, fcntl.LOCK_SH)
    except OSError:
        return False
    finally:
        os.close(handle)


def is_held_by(pid: int, path: Path) -> bool:
    """Whether a process of this user holds `path`, according to the kernel; False if unknown.

    A file can name any process, but it can't fake this.
    """
    process = Path("/proc", str(pid))
    try:
        wanted = path.lstat()
        if not stat.S_ISREG(wanted.st_mode) or wanted.st_nlink != 1 or process.stat().st_uid != os.geteuid():
            return False
        return any(_locks(each, wanted) for each in (process / "fd").iterdir())
    except OSError:
        return False


def _locks(opened: Path, wanted: os.stat_result) -> bool:
    """Whether an open file of a process is this file, with an exclusive lock on it."""
    try:
        if not os.path.samestat(opened.stat(), wanted):
            return False
        told = (opened.parents[1] / "fdinfo" / opened.name).read_text()
    except OSError:
        return False  # closed in the meantime
    return re.search(r"^lock:.*FLOCK.*WRITE", told, re.MULTILINE) is not None


def _taken(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _file_system(path: Path) -> str:
    """The file system that holds a path: its mount point and type."""
    found = [one for one in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(one.mountpoint)]
    if not found:
        return "its file system"
    of_it = max(found, key=lambda one: len(one.mountpoint))
    return f"the file system at {of_it.mountpoint} ({of_it.fstype})"
