"""Speed and memory of a run: rates of a step, summary of a window of steps, memory, peaks of GPUs.

Rates use rank 0's clock and the whole global batch; memory is rank 0's. Imports neither torch nor MLflow
at the top, because the process that sends to MLflow uses it too.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmask.models.stored.typed import is_number

Row = Mapping[str, Any]

_GIB = 2**30
_BY_TIME = ("examples_per_s", "tokens_per_s", "model_tflop_per_s", "mfu_pct", "data_wait_pct")
_LATEST = ("epoch", "lr", "host_memory_gib", "device_memory_gib", "device_memory_peak_gib")
_NOT_SUMMARISED = ("step", "batch", "time", "step_s", "world_size", "skipped")
_PERCENTILES = (50, 90, 99)

# Dense bf16 tensor-core TFLOP/s from NVIDIA's data sheets; the first name contained in the device's name counts.
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    *(("GB200", 2500.0), ("B200", 2250.0), ("GH200", 989.4), ("H200 NVL", 835.5), ("H200", 989.4)),
    *(("H100 NVL", 835.5), ("H100 PCIE", 756.5), ("H100", 989.4), ("H20", 148.0), ("A100", 312.0)),
    *(("A800", 312.0), ("A40", 149.7), ("A30", 165.0), ("A10", 125.0), ("RTX A6000", 154.8)),
    *(("RTX 6000 ADA", 364.2), ("L40S", 362.1), ("L40", 181.0), ("L4", 121.0), ("RTX 5090", 209.5)),
    *(("RTX 4090", 165.2), ("RTX 3090", 71.0)),
)


@dataclass(frozen=True)
class Work:
    """Work of one global batch; flop: forward and backward, without recomputation."""

    tokens: int
    flop: float


@dataclass(frozen=True)
class Throughput:
    """Turns the seconds of a step into rates.

    work(step): work of the global batch of that step (counted from 1); None if the module has no formula for its work.
    peak_tflops: of one device, None if unknown.
    """

    global_batch: int
    world_size: int = 1
    peak_tflops: float | None = None
    work: Callable[[int], Work] | None = None

    def rates(self, step: int, *, seconds: float, waited_s: float) -> dict[str, float]:
        """Rates of one step that took `seconds`, with `waited_s` of them spent waiting for data."""
        rates = {
            "step_s": seconds,
            "examples_per_s": self.global_batch / seconds,
            "data_wait_pct": 100 * min(1.0, waited_s / seconds),
        }
        if self.work is None:
            return rates
        work = self.work(step)
        tflops = work.flop / seconds / 1e12
        rates |= {"tokens_per_s": work.tokens / seconds, "model_tflop_per_s": tflops}
        if self.peak_tflops is not None:
            rates["mfu_pct"] = 100 * tflops / (self.peak_tflops * self.world_size)
        return rates


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Summary of a window of consecutive rows: finite numbers by name, a pure function of the rows.

    Rates are weighted by the steps' time, states are the last row's, other numbers are the mean over the rows
    that have them. Percentiles are of the steps' seconds.
    """
    summary: dict[str, float] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        known = [row for row in rows if is_number(row.get(key))]
        if key in _NOT_SUMMARISED or not known:
            continue
        if key in _LATEST:
            summary[key] = float(known[-1][key])
            continue
        weights = [_weight(row) if key in _BY_TIME else 1.0 for row in known]
        total = math.fsum(row[key] * weight for row, weight in zip(known, weights, strict=True))
        summary[key] = total / math.fsum(weights)
    seconds = [row["step_s"] for row in rows if is_number(row.get("step_s"))]
    if seconds:
        import numpy as np  # not at the top: `status` of a run without steps needs none

        found = np.percentile(seconds, _PERCENTILES)
        summary |= {f"step_s_p{p}": float(value) for p, value in zip(_PERCENTILES, found, strict=True)}
    return summary


def window_start(step: int, every_steps: int) -> int:
    """The first step of the window that contains `step`: windows end at multiples of `every_steps`.

    Log lines, MLflow's points and `flowmask status` summarise these windows, so they show the same numbers.
    """
    return (step - 1) // every_steps * every_steps + 1


def newest_window(rows: Sequence[Row], *, every_steps: int, ended: bool) -> Sequence[Row]:
    """The given rows of the last finished window, in order; empty if there is none.

    ended: no more rows follow, so an incomplete window counts too.
    """
    lasts = (row["step"] for row in reversed(rows))
    last = next((step for step in lasts if ended or step % every_steps == 0), 0)
    return [row for row in rows if window_start(last, every_steps) <= row["step"] <= last]


def memory() -> dict[str, float]:
    """This process's memory in GiB now: resident on the host, allocated on its GPU, and the GPU's maximum so far."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = {"host_memory_gib": pages * os.sysconf("SC_PAGE_SIZE") / _GIB}
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        held["device_memory_gib"] = torch.cuda.memory_allocated() / _GIB
        held["device_memory_peak_gib"] = torch.cuda.max_memory_allocated() / _GIB
    return held


def peak_tflops(device_name: str | None) -> float | None:
    """Dense bf16 peak of a GPU by CUDA's name for it; None if it is not in the table."""
    name = (device_name or "").upper()
    return next((peak for part, peak in _PEAK_TFLOPS if re.search(rf"\b{part}\b", name)), None)


def known_gpus() -> list[str]:
    """The names that `peak_tflops` knows."""
    return [name for name, _ in _PEAK_TFLOPS]


def _weight(row: Row) -> float:
    """A step's seconds, or 1 if unknown."""
    seconds: Any = row.get("step_s")
    return float(seconds) if is_number(seconds) and seconds > 0 else 1.0
