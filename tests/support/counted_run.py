"""A training run whose steps are counted. A test can plant faults into its steps."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from counters import Operators, events
from host_waits import Questions
from runs import start

from flowmask.models.cost.live_memory import LiveMemory
from flowmask.trainer import distributed
from flowmask.trainer.run.run_state import Run

REDUCTIONS = ("all_reduce_sum", "sum_to_rank_zero", "broadcast", "broadcast_object", "gather_objects")


@dataclass(frozen=True)
class StepCounts:
    """Counts of one turn of the training loop, from the begin of one step to the begin of the next."""

    latents: list[torch.Size]  # shapes in the step's micro-batches
    operators: Counter[str]
    flop: int
    questions: Counter[str]  # calls that bring numbers to Python
    reductions: Counter[str]  # calls of trainer/distributed.py
    events: Counter[str]
    needed_bytes: int  # peak of the live tensors, less those at the step's begin
    left_bytes: int  # the same at the step's end

    def unlike(self, other: "StepCounts") -> set[str]:
        """The names of the counts that differ from another step's."""
        return {field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)}


Plant = Callable[[pytest.MonkeyPatch], None]
WARM = 2  # steps: one without counters, one in which the counters see every tensor that stays


def run_counts(
    lab: Path, out: Path, overrides: dict[str, Any], *, steps: int, plants: Sequence[Plant] = ()
) -> list[StepCounts]:
    """Train on the lab's cache: the counts of `steps` steps, then of one step for each of `plants`."""
    last = WARM + steps + len(plants) + 1
    quiet = {"train.steps": last, "checkpoint.every_steps": last + 1, "train.log_every_steps": last + 1}
    with pytest.MonkeyPatch.context() as patch, events() as seen, ExitStack() as modes:
        watch = _Watch(seen, modes, plants=dict(enumerate(plants, start=WARM + steps)), last=last - 1)
        take = Run.take_step

        def take_step(run: Run, batch: Any) -> Any:
            watch.mark([micro.video_mean.shape for micro in batch])
            return take(run, batch)

        patch.setattr(Run, "take_step", take_step)
        for name in REDUCTIONS:
            patch.setattr(distributed, name, watch.counted(name, getattr(distributed, name)))
        assert start(lab, out, quiet | overrides) == 0
    return watch.steps[WARM:]


class _Watch:
    """The counters of a run, read and reset at the begin of each step. Counters slow the run down, so they count in
    these steps alone.
    """

    def __init__(self, seen: Counter[str], modes: ExitStack, *, plants: dict[int, Plant], last: int) -> None:
        self.operators, self.memory, self.questions = Operators(), LiveMemory(), Questions()
        self.reductions: Counter[str] = Counter()
        self.seen, self._modes, self._plants, self._last = seen, modes, plants, last
        self.steps: list[StepCounts] = []
        self._step, self._held = 0, 0
        self._latents: list[torch.Size] = []
        self._planted = modes.enter_context(pytest.MonkeyPatch.context())

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.reductions[name] += 1
            return real(*args)

        return call

    def mark(self, latents: list[torch.Size]) -> None:
        if self._step:
            work = (Counter(self.operators.calls), self.operators.flop, +self.questions.seen)
            around = (Counter(self.reductions), Counter(self.seen))
            held = (self.memory.peak_bytes - self._held, self.memory.bytes - self._held)
            self.steps.append(StepCounts(self._latents, *work, *around, *held))
        self._planted.undo()
        if self._step == 1:
            for mode in (self.memory, self.operators, self.questions):
                self._modes.enter_context(mode)
        if self._step in self._plants:
            self._plants[self._step](self._planted)
        if self._step == self._last:
            self._modes.close()
        for counter in (self.operators.calls, self.questions.seen, self.reductions, self.seen):
            counter.clear()
        self.operators.flop = 0
        self.memory.restart_peak()
        self._held, self._latents = self.memory.bytes, latents
        self._step += 1
