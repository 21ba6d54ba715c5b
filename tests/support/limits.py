"""Limits of time and memory for reading a file."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS, BYTES = 2.0, 200_000_000


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """AssertionError if the block takes longer than SECONDS (more on a busy machine), or 10 `size` + BYTES bytes."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = _kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # restart the peak here
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS * (1 + os.getloadavg()[0] / 2))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    grown = (_kib("VmHWM") - before) << 10
    assert grown < 10 * size + BYTES, f"it took {grown / 1e6:.0f} MB"


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
