"""python -m gpu.worker OUT ...: measures the rows that are not in the journal, while there is time.

A row that raises is a row with its reason, and the next row begins in the same process. If a row leaves too little
memory, or the GPU has failed, this process ends and another one continues.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flowmask.launch.local.processes import die_with_parent
from flowmask.models.device import require_gpu
from flowmask.models.errors import ConfigError
from flowmask.models.process import MISTAKE_EXIT_CODE
from gpu.journal import MATRIX, Journal
from gpu.scale import REAL, TINY

if TYPE_CHECKING:
    from gpu.lab import Lab
    from gpu.rows import Row

_LONGEST, _LEAST_S = 4.0, 120.0  # multiple of its estimate, and least seconds, after which a row counts as hanging
_LEAK_BYTES = 2e9
_SAID = 400  # characters of an error
_AGAIN = 3  # exit code: rows are left for a new process


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", required=True)
    parser.add_argument("--until", type=float, required=True, help="monotonic seconds")
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent)
    if options.device == "cuda":
        try:
            require_gpu("--device is cuda", otherwise="try the script itself with --tiny --device cpu")
        except ConfigError as error:
            print(error, file=sys.stderr)
            return MISTAKE_EXIT_CODE
    from gpu.lab import Lab

    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(TINY if options.tiny else REAL, Path(folder), asked=options.device)
        return measure_rows(lab, Journal(options.out), until_s=options.until)


def measure_rows(lab: "Lab", journal: Journal, *, until_s: float) -> int:
    """Exit code: 0 when no row with enough time is left. until_s: monotonic seconds."""
    from gpu.rows import all_rows

    rows = all_rows(lab.scale)
    done = {row["row"]: row for row in journal.rows()}
    if not done:
        journal.plan([(row.kind, row.name) for row in rows])
    lab.matrix_tflops = done.get(MATRIX, {}).get("tflop_per_s")
    lab.clear()
    expected = took = 1.0
    for row in rows:
        began = time.monotonic()
        needs_s = row.estimate_s * max(1.0, took / expected)
        if row.name in done or began + needs_s > until_s:
            continue
        journal.begin(row.name, kind=row.kind, at_s=began, limit_s=max(_LEAST_S, _LONGEST * needs_s))
        if not measured(lab, row, journal):
            return _AGAIN
        expected, took = expected + row.estimate_s, took + time.monotonic() - began
    return 0


def measured(lab: "Lab", row: "Row", journal: Journal) -> bool:
    """Measure one row and write it; whether this process can measure another."""
    began, found = time.monotonic(), {}
    try:
        found = row.measure(lab)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this row's result
        found = {"failed": why(error)}
    journal.add(row.name, kind=row.kind, **found, took_s=round(time.monotonic() - began, 1))
    if row.name == MATRIX:
        lab.matrix_tflops = found.get("tflop_per_s")
    try:
        lab.clear()
    except RuntimeError as error:  # the GPU has a permanent error
        print(why(error), file=sys.stderr)
        return False
    return not lab.gpu or lab.held() < _LEAK_BYTES


def why(error: Exception) -> str:
    """The begin of an error in one line; libraries often name it in the second one."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_SAID]}"


if __name__ == "__main__":
    sys.exit(main())
