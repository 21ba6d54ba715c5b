"""Scores of trainings that differ only in the seed: mean or paired difference, with an interval.

Both the seeds and the videos are drawn with replacement, because another training and another set of videos would
both give other numbers. Two sets are paired by seed, video and expression.
"""

from collections.abc import Sequence

import numpy as np

from flowmask.models.errors import ConfigError
from flowmask.trainer.score.compare.evaluation import Evaluated
from flowmask.trainer.score.intervals import RESAMPLES, Interval, interval
from flowmask.trainer.score.metrics import MAIN


def over_seeds(
    evaluations: Sequence[Evaluated],
    less: Sequence[Evaluated] | None = None,
    *,
    metric: str = MAIN,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, Interval | None]:
    """The mean of a metric over seeds and expressions, with its 95 % interval; None if nothing varies.

    evaluations: one for each seed, on the same expressions; less: evaluations whose scores are subtracted, in the same
    order of seeds. Only common expressions count; raises ConfigError if there are none.
    """
    every = [*evaluations, *(less or ())]
    shared = sorted(set.intersection(*({pair for pair in one.scores if metric in one.scores[pair]} for one in every)))
    if not shared:
        raise ConfigError(f"{every[0].path} and {every[-1].path} have no expression with {metric} in common")
    values = np.array([[one.scores[pair][metric] for pair in shared] for one in evaluations])
    if less is not None:
        values -= np.array([[one.scores[pair][metric] for pair in shared] for one in less])
    names = sorted({video for video, _ in shared})
    places = np.searchsorted(names, [video for video, _ in shared])
    sums, counts = np.zeros((len(values), len(names))), np.bincount(places, minlength=len(names))
    for row, of_seed in zip(sums, values):
        np.add.at(row, places, of_seed)
    if len(names) < 2:
        return float(values.mean()), None
    generator = np.random.Generator(np.random.Philox(seed))
    seeds, videos = (_times_drawn(generator, among=size, resamples=resamples) for size in sums.shape)
    drawn = np.einsum("rs,sv,rv->r", seeds, sums, videos, optimize=True) / (len(sums) * (videos @ counts))
    return float(values.mean()), interval(drawn)


def _times_drawn(generator: np.random.Generator, *, among: int, resamples: int) -> np.ndarray:
    """How often each of `among` things is drawn in that number of draws: float64 [resamples among]."""
    return generator.multinomial(among, np.full(among, 1 / among), size=resamples).astype(np.float64)
