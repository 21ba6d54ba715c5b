"""The training loop, on one screen, and the decisions that all ranks take together at a step's boundary.

A signal only raises a flag; whether to stop, to save or to give up is agreed between two steps, never in a
handler.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import FrameType
from typing import Any

from data_pipeline.epoch_plan import EpochPlan
from data_pipeline.loader import Loader
from trainer import distributed
from trainer.config import RunConfig
from trainer.ema import ShardedEma
from trainer.engine import Engine, StepResult
from trainer.log import RunLog, StepReport
from trainer.objectives import Objective, read_metrics
from trainer.schedule import learning_rate

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Ending(Enum):
    """Why the loop ended; the state is saved in every case."""

    FINISHED = "finished"
    STOPPED = "stopped by a signal"
    BROKEN = "too many steps in a row were not finite"


@dataclass
class Run:
    """One training run between two steps; `save` is collective and puts this state on disk."""

    config: RunConfig
    plan: EpochPlan
    engine: Engine
    ema: ShardedEma
    objective: Objective
    batches: Loader
    report: StepReport
    log: RunLog
    save_state: Callable[["Run"], None]
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    saved_step: int = field(default=-1)
    signalled: bool = field(default=False)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    @property
    def lr(self) -> float:
        return learning_rate(self.step, self.config.train)

    @property
    def broken(self) -> bool:
        return self.skipped_in_a_row >= self.config.guard.max_consecutive_skips

    def advance(self, result: StepResult) -> None:
        """Count and report the step that was just taken or skipped."""
        lr, epoch = self.lr, self.plan.progress(self.step)
        self.step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": epoch,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "batch": result.digest,
            "world_size": distributed.world_size(),
            **read_metrics(result.metrics),
        }
        if result.skipped:
            self.skipped += 1
            row["skipped"] = True
            examples = ", ".join(map(str, self.plan[self.step - 1].example_ids))
            self.log.say(
                f"step {self.step} skipped: loss {result.loss}, not finite or its gradient is not "
                f"({self.skipped} so far, {self.skipped_in_a_row} in a row); examples {examples}"
            )
        self.report.step_done(row, waited_s=self.batches.wait_s)

    def save_due(self) -> bool:
        return self.step % self.config.checkpoint.every_steps == 0

    def stop_requested(self) -> bool:
        """Whether any rank was told to stop: the same answer on all."""
        return distributed.any_true(self.signalled)

    def request_stop(self) -> None:
        """Ask for a stop at the next step's boundary; all that a signal handler does."""
        self.signalled = True

    def save(self) -> None:
        """Save unless this very step is saved already."""
        if self.saved_step != self.step:
            self.save_state(self)
            self.saved_step = self.step
            self.report.restart_clock()


def train(run: Run) -> Ending:
    """Train until the last step, a signal or the guard; returns which, with the state saved."""
    while not run.finished:
        batch = next(run.batches)
        run.engine.set_lr(run.lr)
        result = run.engine.step(run.objective, batch)
        if not result.skipped:
            run.ema.update()
        run.advance(result)
        if run.broken or run.stop_requested():
            break
        if run.save_due():
            run.save()
    ending = Ending.FINISHED if run.finished else Ending.BROKEN if run.broken else Ending.STOPPED
    run.save()
    return ending


@contextmanager
def stop_signals(raise_flag: Callable[[], None]) -> Iterator[None]:
    """While inside, STOP_SIGNALS only call `raise_flag`: clusters and launchers send them more than once."""
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOP_SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        raise_flag()

    for number in STOP_SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
