"""python -m gpu OUT [--tiny] [--device cpu|cuda] [--seconds N]; gpu.sh calls it.

It imports no torch. When the GPU, the kernel or a time limit ends a worker, this process starts the next one.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from gpu.journal import Journal

_LAST_S = 2.0  # kept to write the results


def main() -> int:
    """0 when every row was measured, failed alone or had no time; the worker's code if no row was measured."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description="Measures this machine's GPU; see benchmarks/gpu.sh.")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the results")
    parser.add_argument("--tiny", action="store_true", help="the tiny Wan, to try the script")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0, help="all in all; the first rows take the first 240")
    for name, kind in (("--spent", float), ("--site", Path)):  # from gpu.sh: seconds so far, its temporary folder
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.out / "rows.jsonl").exists():
        parser.error(f"{options.out} has results already: name another folder")
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    journal = Journal(options.out)
    command = [sys.executable, "-m", "gpu.worker", str(options.out), "--device", options.device]
    until_s = time.monotonic() + options.seconds - (options.spent or 0) - _LAST_S
    command += ["--until", str(until_s), "--parent", str(os.getpid()), *["--tiny"] * options.tiny]
    try:
        code = measure(command, journal, until_s=until_s)
    finally:
        if options.site is not None:
            shutil.rmtree(options.site, ignore_errors=True)
    if rows := journal.rows():
        print(f"{len(rows)} rows in {options.out}: tables.md, results.json, rows.jsonl")
    return code


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def measure(command: Sequence[str], journal: Journal, *, until_s: float) -> int:
    """Run workers one after another until one has reached the end of the rows; until_s: monotonic seconds."""
    while True:
        before = len(journal.rows())
        code = _watched(command, journal, until_s)
        if (row := journal.open_row()) is not None:
            reason = f"its process ended with {code}" if code >= 0 else f"its process was ended by signal {-code}"
            spent = time.monotonic() - row["began"]
            late = spent >= row["limit_s"] or time.monotonic() >= until_s
            said = f"it took longer than {spent:.0f} s" if late else reason
            journal.add(row["row"], kind=row["kind"], failed=said)
        if code == 0 or time.monotonic() >= until_s:
            journal.close()
            return 0
        if len(journal.rows()) == before:
            print(f"no row was measured: the worker ended with {code}; what it said stands above", file=sys.stderr)
            return code if code > 0 else 1


def _watched(command: Sequence[str], journal: Journal, until_s: float) -> int:
    """The exit code of a worker, which is killed when its row takes too long or all time is over."""
    worker = subprocess.Popen(command)
    try:
        while True:
            try:
                return worker.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                row = journal.open_row()
            if time.monotonic() >= min(until_s, row["began"] + row["limit_s"] if row is not None else until_s):
                worker.kill()
    finally:
        worker.kill()
        worker.wait()


if __name__ == "__main__":
    sys.exit(main())
