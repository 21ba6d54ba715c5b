"""Output for people: results on stdout, messages on stderr. Text is never read as markup.

The console is best effort. After `take_over` no write to stdout or stderr fails or blocks for long: not with a slow or
closed reader, a full disk, a closed descriptor or a lost terminal. A command that only prints an answer is different:
its answer must arrive, see `answer`.
"""

import atexit
import contextlib
import io
import os
import queue
import select
import signal
import sys
import threading
import time
from typing import Any

from flowmask.models.errors import UserError
from flowmask.models.safe.words import PlainConsole

PATIENCE_S = 5.0  # waiting time for a reader that reads nothing: once when it is slow, once at the process's end
_BEHIND = 1000  # writes that may wait for a slow reader

out = PlainConsole()
err = PlainConsole(stderr=True)


class ConsoleError(UserError):
    """The answer of a command can't be written to stdout."""


def take_over() -> None:
    """Make stdout and stderr of this process best effort. Every process of FlowMask calls this first.

    Closed descriptors are opened on /dev/null: otherwise the next opened file would get their number and the output.
    """
    while (hole := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(hole, True)
    os.close(hole)
    writers: dict[tuple[int, int], _Writer] = {}
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        where = os.fstat(descriptor)
        # a single one for `2>&1`, which keeps the order
        writer = writers.setdefault((where.st_dev, where.st_ino), _Writer())
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        raw = io.BufferedWriter(_ConsoleBytes(descriptor, writer))
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True))
    atexit.register(_drain, list(writers.values()))


def answer() -> None:
    """For a command that only prints: a closed pipe ends it like SIGPIPE, and a full disk is an error."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _ConsoleBytes):
        raw.must_arrive = True


class _Writer:
    """A thread that writes, so that the caller does not wait. Failed writes are dropped."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[int, bytes] | threading.Event] = queue.SimpleQueue()
        self._gave_up = False
        threading.Thread(target=self._work, name="console", daemon=True).start()

    def put(self, descriptor: int, data: bytes) -> None:
        """Queue `data` for writing. It is dropped if the reader is far behind and its waiting time is used up."""
        until = time.monotonic() + PATIENCE_S
        while self._waiting.qsize() >= _BEHIND:
            self._gave_up = self._gave_up or time.monotonic() > until
            if self._gave_up:
                return
            time.sleep(0.01)
        self._gave_up = False
        self._waiting.put((descriptor, data))

    def drain(self) -> None:
        """Wait until all data is written, or the waiting time is used up."""
        done = threading.Event()
        self._waiting.put(done)
        done.wait(PATIENCE_S)

    def _work(self) -> None:
        while True:
            item = self._waiting.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            with contextlib.suppress(OSError):
                _write_all(*item)


class _ConsoleBytes(io.RawIOBase):
    """The bytes of stdout or stderr, under Python's own buffers and text."""

    def __init__(self, descriptor: int, writer: _Writer) -> None:
        self.must_arrive = False
        self._descriptor, self._writer = descriptor, writer

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        data = bytes(data)
        if self.must_arrive:
            self._deliver(data)
        else:
            self._writer.put(self._descriptor, data)
        return len(data)

    def _deliver(self, data: bytes) -> None:
        try:
            _write_all(self._descriptor, data)
        except BrokenPipeError:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.raise_signal(signal.SIGPIPE)
        except OSError as error:
            self.must_arrive = False  # report it once
            raise ConsoleError(f"stdout can't be written: {str(error.strerror).lower()}") from error


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # another process made the shared terminal or pipe non-blocking
            select.select([], [descriptor], [])


def _drain(writers: list[_Writer]) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, UserError):
            stream.flush()
    for writer in writers:
        writer.drain()
