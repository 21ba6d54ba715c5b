"""Broken consoles: Popen arguments that connect stdout and stderr of a process to such a console."""

import fcntl
import os
import pty
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

BROKEN = ("reader gone", "full disk", "closed", "terminal gone", "sleeping reader", "stopped terminal")


@contextmanager
def broken(way: str) -> Iterator[dict[str, Any]]:
    """Arguments of Popen for a process whose stdout and stderr are broken in one of these ways."""
    if way == "closed":
        yield {"preexec_fn": _close_both}
        return
    kept, given = _opened(way)
    try:
        yield {"stdout": given, "stderr": given}
    finally:
        for descriptor in (*kept, given):
            os.close(descriptor)


def _opened(way: str) -> tuple[list[int], int]:
    """The descriptors that must stay open, and the descriptor to write to."""
    if way == "full disk":
        return [], os.open("/dev/full", os.O_WRONLY)
    reader, writer = pty.openpty() if "terminal" in way else os.pipe()
    if way == "sleeping reader":
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    if "gone" in way:
        os.close(reader)
        return [], writer
    return [reader], writer


def _close_both() -> None:
    for descriptor in (1, 2):
        with suppress(OSError):
            os.close(descriptor)


def controlling(terminal: int) -> Callable[[], None]:
    """For preexec_fn of a process in a new session: make this the controlling terminal, whose end sends SIGHUP."""

    def take() -> None:
        import termios

        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    return take
