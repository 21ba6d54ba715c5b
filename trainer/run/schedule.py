"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from flowmask.trainer.config import TrainConfig


def schedule_length(train: TrainConfig) -> int:
    """Steps that the schedule spans; fixed at the first start, so that raising `steps` bends nothing."""
    return train.schedule_steps or train.steps


def learning_rate(step: int, train: TrainConfig) -> float:
    """Learning rate of the optimiser step that follows `step` finished ones.

    Rises linearly to `lr` over `warmup_steps`, then stays, falls along a cosine to `final_lr_fraction` x lr
    at the schedule's end (and stays there), or drops by `decay_factor` at each of `decay_at_steps`.
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
