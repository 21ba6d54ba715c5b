"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math
from pathlib import Path

from flowmask.trainer.train_config import TrainConfig


def schedule_length(train: TrainConfig) -> int:
    """The number of steps of the schedule; fixed at the first start, so raising `steps` does not change it."""
    return train.schedule_steps or train.last_step


def behind_the_end(train: TrainConfig, *, step: int, out: Path) -> str | None:
    """A note for steps after `step` that lie after the end of the schedule; None if there are none.

    Only a cosine has an end. step: number of finished steps; out: the run's folder, for the suggested commands.
    """
    length, rate = schedule_length(train), train.lr * train.final_lr_fraction
    first = max(step, length) + 1
    if train.schedule != "cosine" or train.final_lr_fraction == 1 or first > train.last_step:
        return None
    said = (
        f"steps {first} to {train.last_step} are after the end of the cosine of {length} steps: learning rate {rate:g}"
    )
    if not step:
        return f"{said}; give train.schedule_steps={train.last_step}, or train.steps={length}"
    end, left = train.last_step, train.last_step - step
    return (
        f"{said}; a run keeps its first schedule. For a longer one start a new run: out=NEW "
        f"train.steps={end} from the start, or out=NEW train.steps={left} model.init={out} from these weights"
    )


def learning_rate(step: int, train: TrainConfig) -> float:
    """Learning rate of the optimiser step that follows `step` finished ones.

    Rises linearly to `lr` over `warmup_steps`. Then it stays constant, or falls along a cosine to
    `final_lr_fraction` x lr at the schedule's end (and stays there), or drops by `decay_factor` at each of
    `decay_at_steps`.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / (train.warmup_steps + 1)
    if train.schedule == "multistep":
        return train.lr * train.decay_factor ** sum(step >= drop for drop in train.decay_at_steps)
    if train.schedule == "cosine":
        span = max(1, schedule_length(train) - train.warmup_steps)
        done = min(1.0, (step - train.warmup_steps) / span)
        floor = train.final_lr_fraction
        return train.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
    return train.lr
