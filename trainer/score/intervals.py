"""Uncertainty of scores: 95 % intervals by drawing videos with replacement (bootstrap).

Videos are drawn, not expressions: the sentences of one video share its pictures, so their scores are correlated. A
number of a set is a function of sums over its videos; a draw counts each video as often as it was drawn.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
_LEVEL_PERCENT = 95.0
_AT_ONCE = 1 << 20  # drawn videos in memory at once
Interval = list[float]  # [low, high]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Drawable:
    """The contribution of one expression.

    video:  the drawn unit
    values: metric -> value, for the metrics whose mean includes this expression
    sums:   metric -> its contribution to a metric of the whole set (`metrics.base.PerSet`)
    """

    video: str
    values: Mapping[str, float]
    sums: Mapping[str, Sequence[float]] = field(default_factory=dict)


def intervals(
    rows: Iterable[Drawable],
    *,
    seed: int,
    of_sums: Mapping[str, Callable[[Sequence[float]], float]] | None = None,
    means_of: Mapping[str, Sequence[str]] | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Interval | None]:
    """The interval of each metric over the rows; None if fewer than two videos count.

    of_sums:  metric -> its value from the total of the `sums` of its name; used in place of a mean
    means_of: metric -> the metrics of which it is the mean in each draw
    A draw in which no expression counts for a metric is not used for that metric's interval. The result is a function
    of the set of rows and the seed: neither the order of rows nor that of videos matters.
    """
    known = sorted(rows, key=lambda row: (row.video, sorted(row.values.items()), str(sorted(row.sums.items()))))
    names = sorted({name for row in known for name in row.values})
    drawn: dict[str, Floats] = {}
    counted: dict[str, int] = {}
    columns = [[row.values.get(name, np.nan) for name in names] for row in known]
    sums, counts = _by_video(known, np.array(columns).reshape(len(known), len(names)))
    both = resampled(np.concatenate([sums, counts], axis=1), seed=seed, resamples=resamples)
    for place, name in enumerate(names):
        drawn[name] = _ratio(both[:, place], both[:, len(names) + place])
        counted[name] = int(np.count_nonzero(counts[:, place]))
    for name, value in (of_sums or {}).items():
        adding = [row for row in known if name in row.sums]
        if not adding:
            continue
        added, counts = _by_video(adding, np.array([row.sums[name] for row in adding], float))
        drawn[name] = np.array([value(one.tolist()) for one in resampled(added, seed=seed, resamples=resamples)])
        counted[name] = len(added)
    for name, parts in (means_of or {}).items():
        if all(part in drawn for part in parts):
            drawn[name] = np.mean([drawn[part] for part in parts], axis=0)
            counted[name] = min(counted[part] for part in parts)
    return {name: interval(values) if counted[name] > 1 else None for name, values in drawn.items()}


def resampled(sums: Floats, *, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Sums [videos k] over each draw of the same number of videos, with replacement: [resamples k]."""
    videos = len(sums)
    if not videos:
        return np.full((resamples, sums.shape[1]), np.nan)
    generator = np.random.Generator(np.random.Philox(seed))
    found = np.empty((resamples, sums.shape[1]))
    step = max(1, _AT_ONCE // videos)
    for start in range(0, resamples, step):
        some = min(step, resamples - start)
        chosen = generator.integers(videos, size=(some, videos)) + videos * np.arange(some)[:, None]
        times = np.bincount(chosen.ravel(), minlength=some * videos).reshape(some, videos)
        found[start : start + some] = times @ sums
    return found


def interval(values: Floats) -> Interval | None:
    """The middle 95 % of values [draws] (percentile bootstrap, Efron 1979); NaN are ignored; None if all are NaN."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    outside = (100 - _LEVEL_PERCENT) / 2
    low, high = np.percentile(known, [outside, 100 - outside])
    return [float(low), float(high)]


def _by_video(rows: Sequence[Drawable], values: Floats) -> tuple[Floats, Floats]:
    """Sums of the rows' values [n k] in each video, and the count of numbers in each column; both [videos k]."""
    names: dict[str, int] = {}
    places = [names.setdefault(row.video, len(names)) for row in rows]
    known = np.isfinite(values)
    sums, counts = np.zeros((2, len(names), values.shape[1]))
    np.add.at(sums, places, np.where(known, values, 0))
    np.add.at(counts, places, known)
    return sums, counts


def _ratio(sums: Floats, counts: Floats) -> Floats:
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
