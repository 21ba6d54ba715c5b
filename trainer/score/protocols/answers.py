"""The common start of video protocols: J and F of one expression's true and predicted masks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.metrics.f import boundary_accuracy
from flowmask.trainer.score.metrics.j import region_similarity


@dataclass(frozen=True)
class Agreement:
    """The scores of one expression; `j` and `f` are fractions, means over the frames.

    has_target: whether a true mask has a pixel in any frame; answered: whether a predicted mask has one
    """

    j: float
    f: float
    has_target: bool
    answered: bool


def agreement(truth: Mask, predicted: Mask | None, *, has_target: bool | None = None) -> Agreement:
    """Agreement of two bool [T H W]; None is an expression without a prediction, which gets 0 and 0.

    has_target: whether the sentence has a target; None: whether a true mask has a pixel
    """
    named = bool(truth.any()) if has_target is None else has_target
    if predicted is None:
        return Agreement(0.0, 0.0, named, False)
    j, f = frame_scores(truth, predicted)
    return Agreement(float(np.mean(j)), float(np.mean(f)), named, bool(predicted.any()))


def frame_scores(truth: Mask, predicted: Mask) -> tuple[list[float], list[float]]:
    """J and F of each frame of two bool [T H W]; ValueError if they differ in T."""
    pairs = list(zip(truth, predicted, strict=True))
    return [region_similarity(*pair) for pair in pairs], [boundary_accuracy(*pair) for pair in pairs]


def mean(values: Iterable[float]) -> float | None:
    """The mean; None if there are no values."""
    known = list(values)
    return float(np.mean(known)) if known else None


def means(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float | None]:
    """The mean of each named number over the rows."""
    return {name: mean(row[name] for row in rows) for name in names}
