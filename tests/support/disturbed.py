"""A call in a forked child that is killed, or meets a full disk, at its n-th file-system call.

The imports are done before the fork.
"""

import errno
import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmask.models.errors import UserError

FINISHED, REFUSED, BROKEN, KILLED = 0, 7, 9, -signal.SIGKILL
CALLS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
CHILD_MAY_TAKE_S = 300.0
TAKE_SPACE = {"os.mkdir", "os.link", "os.symlink"}


def takes_space(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a full disk refuses this call. A full disk allows renames and deletions."""
    return event in TAKE_SPACE or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))


def in_child(call: Callable[[], Any], *, hook: Callable[[str, tuple[Any, ...]], None] | None = None) -> int:
    """Start `call` in a fork; return its pid. The child ends with FINISHED, REFUSED (a one-line UserError) or BROKEN.

    A child that hangs prints its stack and ends with 1.
    """
    pid = os.fork()
    if pid:
        return pid
    code = BROKEN
    faulthandler.dump_traceback_later(CHILD_MAY_TAKE_S, exit=True)
    try:
        if hook is not None:
            sys.addaudithook(hook)
        call()
        code = FINISHED
    except UserError as error:
        code = BROKEN if "\n" in str(error) else REFUSED
        os.write(2, f"{error}\n".encode())
    except BaseException as error:  # noqa: BLE001 - the child must not come back into pytest
        os.write(2, repr(error).encode())
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    """How a child ended: its exit code, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def calls_of(call: Callable[[], Any], *, counted: Callable[[str, tuple[Any, ...]], bool]) -> int:
    """How many counted file-system calls `call` makes without a disturbance, in a child."""
    reading, writing = os.pipe()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if counted(event, arguments):
            os.write(writing, b".")

    code = end_of(in_child(call, hook=count))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert code == FINISHED
        return len(pipe.read())


def every_call(event: str, arguments: tuple[Any, ...]) -> bool:
    return event in CALLS


def kill_at(number: int, call: Callable[[], Any]) -> int:
    """Send SIGKILL before the n-th file-system call; n starts at 1."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        seen += event in CALLS
        if seen == number and event in CALLS:
            os.kill(os.getpid(), signal.SIGKILL)

    return end_of(in_child(call, hook=hook))


def full_from(number: int, call: Callable[[], Any]) -> int:
    """The disk is full from the n-th call that needs space; n starts at 1."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if takes_space(event, arguments):
            seen += 1
            if seen >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    return end_of(in_child(call, hook=hook))


def with_file_limit(size: int, call: Callable[[], Any]) -> int:
    """The kernel lets no file grow beyond `size` bytes, whichever library writes it (`ulimit -f`)."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        call()

    return end_of(in_child(limited))


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, except three files whose content depends on the writer."""
    skipped = {".flowmask.json", ".lock", ".owner.json"}
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file()) and path.name not in skipped
    }
