"""The decisions of the loop: the effect of a signal, and the steps at which the state is saved."""

import os
import signal
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest

from flowmask.models.process import STOP_SIGNALS
from flowmask.trainer.phases import Phases
from flowmask.trainer.run.loop import Ending, stop_signals, train
from flowmask.trainer.run.run_state import Run


class Nothing:
    """Stands for parts of a run that a test does not use."""

    wait_s = copy_wait_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **named: 0.0


class Engine(Nothing):
    """Steps whose numbers in `bad` are skipped."""

    def __init__(self, bad: Collection[int]) -> None:
        self.taken, self.bad = 0, bad

    def step(self, objective: Any, batch: Any, **limits: float) -> Any:
        self.taken += 1
        skipped = self.taken in self.bad
        return SimpleNamespace(loss=1.0, grad_norm=1.0, skipped=skipped, digest=0, metrics={})


class Plan(Nothing):
    def __getitem__(self, step: int) -> Any:
        return SimpleNamespace(example_ids=[step])


class Guard(Nothing):
    loss_limit = grad_norm_limit = 100.0


class Saves(Nothing):
    """Checkpoints whose saves always succeed at once."""

    busy = False

    def __init__(self, saved: list[int]) -> None:
        self.saved = saved

    def covers(self, step: int) -> bool:
        return step in self.saved


class Witness(Nothing):
    """No profile is requested."""

    phases = Phases()

    def profile_asked(self, step: int) -> int:
        return 0


class Batches(Nothing):
    def __next__(self) -> list[Any]:
        return []


def make(*, steps: int, every: int, bad: Collection[int] = (), patience: int = 2) -> tuple[Run, list[int]]:
    saved: list[int] = []
    config: Any = SimpleNamespace(
        train=SimpleNamespace(last_step=steps, warmup_steps=0, schedule="constant", lr=1.0),
        checkpoint=SimpleNamespace(every_steps=every, milestone_every_steps=None),
        guard=SimpleNamespace(max_consecutive_skips=patience),
        evaluate=SimpleNamespace(every_steps=None, every_epochs=None, best=None),
    )
    nothing: Any = Nothing()
    parts: Any = {"plan": Plan(), "engine": Engine(bad), "batches": Batches(), "guard": Guard()}
    others: Any = dict.fromkeys(("ema", "objective", "report", "log", "measure"), nothing)
    checkpoints: Any = Saves(saved)
    witness: Any = Witness()
    hooks: Any = {"begin_save": lambda run: saved.append(run.step), "on_validated": lambda run, found: None}
    return Run(config=config, checkpoints=checkpoints, witness=witness, **parts, **others, **hooks), saved


def test_the_state_is_saved_when_due_and_at_the_end_but_never_twice() -> None:
    for steps, expected in [(7, [3, 6, 7]), (6, [3, 6])]:
        run, saved = make(steps=steps, every=3)
        assert train(run) is Ending.FINISHED and saved == expected


def test_only_skips_in_a_row_break_a_run() -> None:
    run, saved = make(steps=9, every=100, bad={2, 4, 6, 7})
    assert train(run) is Ending.BROKEN and saved == [7] and run.skips.total() == 4
    assert train(make(steps=9, every=100, bad={2, 4, 6, 8})[0]) is Ending.FINISHED


def test_a_signal_only_raises_a_flag_however_often_it_comes_and_leaves_the_old_handlers() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    run, saved = make(steps=9, every=100)
    with stop_signals(run.request_stop):
        for number in (*STOP_SIGNALS, *STOP_SIGNALS):
            os.kill(os.getpid(), number)
        assert not saved and run.signalled
        assert train(run) is Ending.STOPPED
    assert saved == [1] and [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("eval_jf", [float("nan"), 3.0, 3.0, 5.0, 4.0], [2, 4]), ("eval_loss", [3.0, 4.0, float("nan"), 2.0], [1, 4])],
)
def test_the_best_evaluation_is_saved_at_once_and_a_broken_one_is_never_best(
    metric: str, values: list[float], best: list[int]
) -> None:
    run, saved = make(steps=len(values), every=100)
    run.config.evaluate.every_steps = 1  # type: ignore[misc]
    left = iter(values)
    run.measure = lambda _: {metric: next(left)}
    train(run)
    assert saved == sorted({*best, len(values)})
    assert run.best == {"step": best[-1], "metric": metric, "value": values[best[-1] - 1], "definition": {}}


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, [4, 7]), (2.0, [7]), (0.5, [2, 4, 6, 7])])
def test_an_evaluation_is_due_when_an_epoch_is_over_wherever_its_last_step_lies(
    epochs: float, steps: list[int]
) -> None:
    run, _ = make(steps=9, every=100)
    run.config.evaluate.every_epochs = epochs  # type: ignore[misc]
    run.plan.progress = lambda step: step / 4 if step < 4 else 1 + (step - 4) / 3  # type: ignore[method-assign]
    evaluated: list[int] = []

    def measure(one: Run) -> dict[str, float]:
        evaluated.append(one.step)
        return {"eval_loss": 1.0}

    run.measure = measure
    train(run)
    assert [step for step in evaluated if step <= 7] == steps
