"""Who works in a folder: locks that the kernel gives back when their holder dies, however it dies (flock).

Asking whether one is held takes it for an instant, so taking one is patient for longer than that. Only who may write
the folder may open its lock: a reader's lock, which the kernel lets anybody take on a file that he may read, can't
keep a writer out.
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

GLANCE_S = 1.0  # longer than anybody needs to ask
_POLL_S = 0.05


def take(path: Path, *, patience_s: float = GLANCE_S) -> int | None:
    """Hold `path`, made where it is missing; the open file, which holds it until it is closed, or None."""
    mode = 0o660 if path.parent.stat().st_mode & 0o020 else 0o600
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode)
    with suppress(PermissionError):  # another member of the group made it
        os.fchmod(handle, mode)  # one from before could be read by all
    deadline = time.monotonic() + patience_s
    while not _taken(handle, fcntl.LOCK_EX):
        if time.monotonic() >= deadline:
            os.close(handle)
            return None
        time.sleep(_POLL_S)
    return handle


def is_held(path: Path) -> bool:
    """Whether somebody holds `path` now."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _taken(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def _taken(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
