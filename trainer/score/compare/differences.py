"""Paired differences of evaluations over their common expressions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowmask.models.errors import ConfigError
from flowmask.trainer.score.compare.evaluation import Evaluated, Pair, open_evaluation
from flowmask.trainer.score.intervals import Drawable, Interval, intervals
from flowmask.trainer.score.metrics import MAIN, metrics

N_ACC = "n_acc"


@dataclass(frozen=True)
class Difference:
    """Means of one metric over the common expressions, and the interval of their difference over videos."""

    first: float
    other: float
    interval: Interval | None

    @property
    def value(self) -> float:
        return self.other - self.first


@dataclass(frozen=True)
class PairedScores:
    """One evaluation against the first.

    metrics: by name, in display order; N-acc last, over the expressions that name nothing, if both evaluations
             record them; shared: in the order of the first evaluation
    """

    first: Evaluated
    other: Evaluated
    shared: list[Pair]
    metrics: dict[str, Difference]

    def change(self, pair: Pair) -> float:
        """Difference of an expression's main metric to the first evaluation."""
        return self.other.scores[pair][MAIN] - self.first.scores[pair][MAIN]

    def counts(self, *, first: str, other: str) -> str:
        """Numbers of compared expressions and of those in only one evaluation, in one line."""
        alone = [len(one.scores) - len(self.shared) for one in (self.first, self.other)]
        videos = len({video for video, _ in self.shared})
        said = f"{len(self.shared):,} expressions of {videos:,} videos are in both"
        return f"{said}; {alone[0]:,} only in {first}, {alone[1]:,} only in {other}"


def compare(paths: Sequence[Path], *, seed: int = 0) -> list[PairedScores]:
    """Compare each further evaluation with the first. Raises ConfigError if they can't be compared.

    seed: of the draws of the intervals
    """
    if len(paths) < 2:
        raise ConfigError(f"{len(paths)} evaluation is given, but two or more are needed: flowmask compare A B")
    first, *others = map(open_evaluation, paths)
    return [_compare(first, other, seed=seed) for other in others]


def _compare(first: Evaluated, other: Evaluated, *, seed: int) -> PairedScores:
    shared = [pair for pair in first.scores if pair in other.scores]
    if not shared:
        raise ConfigError(
            f"{first.path} and {other.path} have no expression in common; compare evaluations of one dataset and split"
        )
    names = [
        name
        for name in metrics() | first.scores[shared[0]]
        if all(name in one.scores[pair] for one in (first, other) for pair in shared)
    ]
    if MAIN not in names:
        raise ConfigError(f"{first.path} and {other.path} do not both have {MAIN} of each expression; evaluate again")
    values = {name: {pair: [one.scores[pair][name] for one in (first, other)] for pair in shared} for name in names}
    nothing = [pair for pair in shared if pair in first.left_empty and pair in other.left_empty]
    if nothing:
        values[N_ACC] = {pair: [100.0 * one.left_empty[pair] for one in (first, other)] for pair in nothing}
    rows = [
        Drawable(pair[0], {name: of[pair][1] - of[pair][0] for name, of in values.items() if pair in of})
        for pair in shared
    ]
    sure = intervals(rows, seed=seed)
    differences = {}
    for name, of in values.items():
        one, two = (float(np.mean(column)) for column in zip(*of.values()))
        differences[name] = Difference(one, two, sure[name])
    return PairedScores(first, other, shared, differences)
