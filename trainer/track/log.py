"""The log of a run: log.txt, the console, and the numbers of each step for metrics.jsonl, which MLflow's data
comes from.

A bar on a terminal, plain lines elsewhere; a file never gets a control character. Only rank 0 has a log.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flowmask.data_pipeline.cache.manifest import BucketEntry
from flowmask.data_pipeline.read.batches import Plan
from flowmask.models.safe.words import PlainConsole, printable
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.objectives.base import Objective
from flowmask.trainer.state.run_folder import RunFolder
from flowmask.trainer.track.meters import Throughput, Work, memory, peak_tflops, summarise, window_start


class RunLog:
    """Lines with the time of day, to log.txt and the console; without a file it is silent (ranks above 0)."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = path.open("a", encoding="utf-8", buffering=1) if path else None
        self.console = PlainConsole(file=sys.stderr, quiet=path is None)

    def say(self, message: str) -> None:
        """Write one line now."""
        if self._file is None:
            return
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable(message)}"
        self._file.write(line + "\n")
        self.console.print(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class StepReport:
    """Turns finished steps into rows, log lines and progress of the bar; silent without a folder."""

    def __init__(
        self,
        log: RunLog,
        folder: RunFolder | None,
        throughput: Throughput,
        *,
        steps: int,
        start_step: int,
        every_steps: int,
    ) -> None:
        self._log, self._folder, self._throughput = log, folder, throughput
        self._steps, self._every = steps, every_steps
        self._width = len(str(steps))
        # continue a window that an earlier start has begun: its rows are in the file
        self._window = [] if folder is None else folder.rows(window_start(start_step + 1, every_steps), start_step)
        self._unsaid = False
        self._bar = _bar(log.console) if folder is not None else None
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=steps, completed=start_step)
            self._bar.start()
        self._waited_s = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start the next step's time now: the time before (a save) was not training."""
        self._started = time.perf_counter()

    def step_done(self, row: Mapping[str, Any], *, waited_s: float) -> None:
        """Report one step; `waited_s`: total seconds that this run has waited for data."""
        now = time.perf_counter()
        took, wait = now - self._started, waited_s - self._waited_s
        self._started, self._waited_s = now, waited_s
        if self._folder is None:
            return
        step = row["step"]
        line_due = step % self._every == 0 or step == self._steps
        row = dict(row) | {"time": time.time()} | self._throughput.rates(step, seconds=took, waited_s=wait)
        if line_due:
            row |= memory()
        self._folder.add_row(row)
        self._window.append(row)
        self._unsaid = True
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if line_due:
            self._flush()

    def _flush(self) -> None:
        """One line for the steps of this window: means of loss and norm over steps, rates over their time."""
        window, self._window, self._unsaid = self._window, [], False
        last, mean = window[-1], summarise(window)
        loss, norm = mean.get("loss", math.nan), mean.get("grad_norm", math.nan)
        if self._bar is not None:
            self._bar.update(self._task, description=f"loss {loss:.4f}")
        mfu = f"  MFU {mean['mfu_pct']:.1f} %" if "mfu_pct" in mean else ""
        self._log.say(
            f"step {last['step']:>{self._width}}/{self._steps}  epoch {last['epoch']:.2f}  loss {loss:.5f}  "
            f"lr {last['lr']:.3g}  grad norm {norm:.3f}  {mean['examples_per_s']:.2f} samples/s  "
            f"data wait {mean['data_wait_pct']:.0f} %{mfu}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Report the remaining steps and release the terminal."""
        if self._unsaid:
            self._flush()
        if self._bar is not None:
            self._bar.stop()


def throughput_of(
    config: RunConfig, plan: Plan, objective: Objective, *, buckets: Sequence[BucketEntry], module: Any
) -> Throughput:
    """Computes rates from a step's seconds, if the module's objective has a formula for its work.

    module: as built; its `config` has the sizes. The peak is `tracking.peak_tflops`, else the GPU's.
    """
    device = distributed.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    examples, shape = config.train.global_batch, getattr(module, "config", {})
    by_bucket = []
    for bucket in buckets:
        flop = objective.training_flop(shape, bucket.latent_shape, adapters=config.lora is not None)
        if flop is not None:
            by_bucket.append(Work(examples * objective.tokens(shape, bucket.latent_shape), examples * flop))
    return Throughput(
        global_batch=examples,
        world_size=distributed.world_size(),
        peak_tflops=config.tracking.peak_tflops or peak_tflops(name),
        work=(lambda step: by_bucket[plan[step - 1].bucket]) if by_bucket else None,
    )


def _bar(console: Console) -> Progress | None:
    if not console.is_terminal:
        return None
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
