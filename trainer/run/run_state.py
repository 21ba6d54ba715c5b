"""One training run between two steps: its counters, its reports, and the decisions of all ranks together.

A signal only raises a flag. All ranks agree between two steps whether to stop, save or give up, never in a
signal handler. All state that is not in a checkpoint can be computed from the checkpoint.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flowmask.data_pipeline.read.batches import Batches, Plan
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.explain.witness import Witness
from flowmask.trainer.objectives.base import Objective, read_metrics
from flowmask.trainer.run.best import is_better, metric_of
from flowmask.trainer.run.diagnose import Skip, why_skipped
from flowmask.trainer.run.guard import SpikeGuard
from flowmask.trainer.run.schedule import learning_rate
from flowmask.trainer.state.saving import Checkpoints
from flowmask.trainer.step.ema import ShardedEma
from flowmask.trainer.step.engine import Engine, StepResult
from flowmask.trainer.track.log import RunLog, StepReport


@dataclass
class Run:
    """One training run. Taking a step, evaluating, saving and `agree` are collective."""

    config: RunConfig
    plan: Plan
    engine: Engine
    ema: ShardedEma
    objective: Objective
    guard: SpikeGuard
    batches: Batches
    report: StepReport
    log: RunLog
    checkpoints: Checkpoints
    witness: Witness
    begin_save: Callable[["Run"], None]
    measure: Callable[["Run"], Mapping[str, float] | None]
    on_validated: Callable[["Run", Mapping[str, float]], None]
    step: int = 0
    skips: Counter[str] = field(default_factory=Counter)  # by reason
    skipped_in_a_row: int = 0
    last_skip: str = ""  # its reason
    evaluated_step: int = 0
    best: Mapping[str, Any] | None = None  # step, metric, value and definition of the best evaluation so far
    definition: Mapping[str, Any] = field(default_factory=dict)  # of evaluations, see `best.py`
    signalled: bool = False  # this rank received a stop signal
    stopping: bool = False  # any rank received one, as agreed by all ranks
    saving: bool = False  # any rank is still writing its save

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.last_step

    @property
    def empty(self) -> bool:
        """Whether no step counted, neither in this start nor in an earlier one."""
        return self.engine.updates == 0

    @property
    def lr(self) -> float:
        return learning_rate(self.step, self.config.train)

    @property
    def broken(self) -> bool:
        return self.skipped_in_a_row >= self.config.guard.max_consecutive_skips

    def next_batch(self) -> Any:
        """This rank's micro-batches of the next step."""
        self.witness.phases.enter("read")
        waited_s = self.batches.copy_wait_s
        batch = next(self.batches)
        self.witness.phases.copied(self.batches.copy_wait_s - waited_s)
        return batch

    def take_step(self, batch: Any) -> StepResult:
        """One optimizer step within the guard's limits; a skipped step changes neither weights nor EMA."""
        self.engine.set_lr(self.lr)
        limits = {"loss_limit": self.guard.loss_limit, "grad_norm_limit": self.guard.grad_norm_limit}
        result = self.engine.step(self.objective, batch, **limits)
        if result.skipped:
            skip = why_skipped(result, batch, loss_limit=limits["loss_limit"])
            self.skips[skip.reason] += 1
            self.skipped_in_a_row += 1
            self.last_skip = skip.reason
            self._say_skipped(skip, result, **limits)
            return result
        self.skipped_in_a_row = 0
        self.guard.took(loss=result.loss, grad_norm=result.grad_norm)
        self.ema.update()
        return result

    def _say_skipped(self, skip: Skip, result: StepResult, *, loss_limit: float, grad_norm_limit: float) -> None:
        examples = ", ".join(map(str, skip.examples or self.plan[self.step].example_ids))
        self.log.say(
            f"step {self.step + 1} skipped: {skip.reason}; loss {result.loss:.6g} (limit {loss_limit:.6g}), "
            f"gradient norm {result.grad_norm:.6g} (limit {grad_norm_limit:.6g}) "
            f"({self.skips.total()} so far, {self.skipped_in_a_row} in a row); examples {examples}"
        )

    def advance(self, result: StepResult) -> None:
        """Count and report the step that was just taken or skipped."""
        self.witness.phases.enter("other")
        lr = self.lr
        self.step += 1
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": self.plan.progress(self.step),
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "batch": result.digest,
            "world_size": distributed.world_size(),
            **read_metrics(result.metrics),
        }
        if result.skipped:
            row["skipped"] = True
        self.report.step_done(row, waited_s=self.batches.wait_s)

    def validation_due(self) -> bool:
        """Whether the weights of the current step still need to be evaluated."""
        if self.evaluated_step == self.step:
            return False
        every, epochs = self.config.evaluate.every_steps, self.config.evaluate.every_epochs
        if every is not None and self.step % every == 0:
            return True
        return epochs is not None and self._epochs(epochs, self.step) > self._epochs(epochs, self.step - 1)

    def _epochs(self, length: float, step: int) -> int:
        """Number of complete periods of `length` epochs before `step`."""
        return math.floor(self.plan.progress(max(0, step)) / length)

    def validate(self) -> None:
        """Evaluate the EMA weights; new best ones are saved at once.

        A stop request may end it without a result; then the next start begins with this evaluation.
        """
        with self.witness.phases.within("evaluate"):
            found = self.measure(self)
        if found is None:
            return
        self.evaluated_step = self.step
        metric = metric_of(self.config.evaluate, found)
        value = found.get(metric)
        if value is not None and is_better(metric, value, self.best):
            self.best = {"step": self.step, "metric": metric, "value": value, "definition": self.definition}
            self._save_best()
        self.on_validated(self, found)
        self.report.restart_clock()

    def _save_best(self) -> None:
        with self.witness.phases.within("save"):
            if self.checkpoints.covers(self.step):  # the step was saved at a signal, and the next start evaluates it
                self.checkpoints.mark_best()
            else:
                self.begin_save(self)

    @property
    def is_best(self) -> bool:
        """Whether the weights of this step are the best so far."""
        return self.best is not None and self.best["step"] == self.step

    def save_due(self) -> bool:
        settings = self.config.checkpoint
        regular = (settings.every_steps, settings.milestone_every_steps)
        return any(every and self.step % every == 0 for every in regular)

    def agree(self) -> None:
        """Find out, in one reduction, whether any rank received a stop signal, whether any is still writing, and
        whether a profile was requested."""
        asked = self.witness.profile_asked(self.step)
        stopping, saving, profile_steps = distributed.sum_each(self.signalled, self.checkpoints.busy, asked)
        self.stopping, self.saving = bool(stopping), bool(saving)
        self.witness.agreed(self.step, profile_steps=profile_steps)

    def stop_asked(self) -> bool:
        """`agree`, and whether to stop."""
        self.agree()
        return self.stopping

    def move_save_on(self) -> None:
        """Advance a save once every rank has finished its previous stage."""
        if not self.saving:
            with self.witness.phases.within("save"):
                self.checkpoints.advance()

    def request_stop(self) -> None:
        """Ask for a stop at the next step's boundary; a signal handler calls only this."""
        self.signalled = True

    def save(self) -> None:
        """Begin a save, unless this step is already saved or being saved."""
        if not self.checkpoints.covers(self.step):
            with self.witness.phases.within("save"):
                self.begin_save(self)

    def save_and_wait(self) -> None:
        """Save this step and wait until it is on disk. Raises CheckpointError on every rank if that fails."""
        self.checkpoints.settle()
        self.save()  # also if an earlier save of this step has failed
        self.checkpoints.require(self.step)
