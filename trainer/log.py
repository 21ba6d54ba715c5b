"""What a person sees of a run: log.txt, the console, and the numbers of each step on their way to
metrics.jsonl.

A bar on a terminal, plain lines anywhere else; a file never gets a control character. Only rank 0 has one.
"""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.run_folder import RunFolder
from trainer.tracking import Tracker


class RunLog:
    """Lines with the time of day, to log.txt and the console; without a file it is silent (ranks above 0)."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = path.open("a", encoding="utf-8", buffering=1) if path else None
        self.console = Console(file=sys.stderr, highlight=False, quiet=path is None, soft_wrap=True)

    def say(self, message: str) -> None:
        """One line, now."""
        if self._file is None:
            return
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}"
        self._file.write(line + "\n")
        self.console.print(line, markup=False)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class StepReport:
    """Turns finished steps into rows, log lines, tracked metrics and the bar's advance."""

    def __init__(
        self,
        log: RunLog,
        folder: RunFolder | None,
        tracker: Tracker | None,
        *,
        steps: int,
        start_step: int,
        global_batch: int,
        every_steps: int,
    ) -> None:
        self._log, self._folder, self._tracker = log, folder, tracker
        self._steps, self._global_batch, self._every = steps, global_batch, every_steps
        self._width = len(str(steps))
        self._window: list[Mapping[str, Any]] = []
        self._bar = _bar(log.console) if folder is not None else None
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=steps, completed=start_step)
            self._bar.start()
        self._waited_s = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """The next step's time starts now: what came before (a save) was not training."""
        self._started = time.perf_counter()

    def step_done(self, row: Mapping[str, Any], *, waited_s: float) -> None:
        """Report one step; `waited_s`: how long this run has waited for data so far."""
        now = time.perf_counter()
        took, wait = now - self._started, waited_s - self._waited_s
        self._started, self._waited_s = now, waited_s
        if self._folder is None:
            return
        row = dict(row) | {
            "time": time.time(),
            "examples_per_s": self._global_batch / took,
            "data_wait_pct": 100 * min(1.0, wait / took),
        }
        self._folder.add_row({key: _finite(value) for key, value in row.items()})
        self._window.append(row | {"seconds": took})
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=f"loss {row['loss']:.4f}")
        if row["step"] % self._every == 0 or row["step"] == self._steps:
            self._flush()

    def _flush(self) -> None:
        """One line for the steps since the last: means of loss and norm over them, rates over their time."""
        window, self._window = self._window, []
        last, seconds = window[-1], sum(row["seconds"] for row in window)
        loss, norm = (_mean([row[key] for row in window]) for key in ("loss", "grad_norm"))
        rate = len(window) * self._global_batch / seconds
        wait = sum(row["data_wait_pct"] * row["seconds"] for row in window) / seconds
        self._log.say(
            f"step {last['step']:>{self._width}}/{self._steps}  epoch {last['epoch']:.2f}  loss {loss:.5f}  "
            f"lr {last['lr']:.3g}  grad norm {norm:.3f}  {rate:.2f} samples/s  data wait {wait:.0f} %"
        )
        if self._tracker is not None:
            tracked = {key: value for key, value in last.items() if key not in _NOT_TRACKED}
            tracked |= {"loss": loss, "grad_norm": norm, "examples_per_s": rate, "data_wait_pct": wait}
            self._tracker.log(
                last["step"], {k: float(v) for k, v in tracked.items() if _finite(v) is not None}
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Report what is left and give the terminal back."""
        if self._window:
            self._flush()
        if self._bar is not None:
            self._bar.stop()


_NOT_TRACKED = ("step", "batch", "time", "seconds", "world_size", "skipped")


def _bar(console: Console) -> Progress | None:
    if not console.is_terminal:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _finite(value: Any) -> Any:
    """JSON and MLflow know no nan: a number that is none becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
