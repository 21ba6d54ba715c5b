"""The metrics: each is one file, here or in an installed package, and needs no other change.

Its name is that of its file, or of an entry point of the group `flowmask.metrics`; the contract is `base.Metric`.
scores.json, the report, the table at an evaluation's end, validation and MLflow use it automatically.
Imports only `models.plugins`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flowmask.models.plugins.registry import Registry
from flowmask.trainer.score.metrics.base import Combined, Mask, Measured, Metric, PerSet, Place

_KNOWN = Registry(__name__, Metric, group="flowmask.metrics", key="a metric")
MAIN = "jf"  # ranks expressions and chooses the best checkpoint
Scores = dict[str, float]


def metrics() -> dict[str, Metric]:
    """Every metric by name, in display order."""
    found = {name: _KNOWN.get(name)() for name in _KNOWN.names()}
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


def shown_in(place: Place) -> dict[str, Metric]:
    """The metrics that are shown in a place."""
    return {name: metric for name, metric in metrics().items() if place in metric.shown}


def from_outside() -> list[str]:
    """The names of the metrics of installed packages."""
    return _KNOWN.installed()


class Tally:
    """The scores of one expression, collected a few frames at a time."""

    def __init__(self) -> None:
        known = metrics().items()
        self._measured = {name: metric for name, metric in known if isinstance(metric, Measured)}
        self._combined = {name: metric for name, metric in known if isinstance(metric, Combined)}
        self._frames: dict[str, list[Any]] = {name: [] for name in self._measured}

    def add(self, truth: Mask, predicted: Mask) -> None:
        """Add frames of two masks bool [F H W]; ValueError if they differ in F."""
        for pair in zip(truth, predicted, strict=True):
            for name, metric in self._measured.items():
                self._frames[name].append(metric.frame(*pair))

    def scores(self) -> Scores:
        """Every metric's value over the frames so far."""
        found = {name: metric.expression(self._frames[name]) for name, metric in self._measured.items()}
        return found | {name: metric.of(found) for name, metric in self._combined.items()}

    def j_and_f(self) -> tuple[list[float], list[float]]:
        """J and F of each frame, fractions."""
        return self._frames["j"], self._frames["f"]

    def sums(self) -> dict[str, list[float]]:
        """The sums of the metrics per set, to be added over expressions."""
        per_set = [name for name, metric in self._measured.items() if isinstance(metric, PerSet)]
        return {name: np.sum(self._frames[name], axis=0).tolist() for name in per_set}


def totals(scores: Sequence[Scores], sums: Iterable[Mapping[str, Sequence[float]]]) -> Scores:
    """Every metric over a set of expressions: means of their `scores`, or per set from their `sums`."""
    if not scores:
        return {}
    found = {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}
    added = [one for one in sums if one]
    for name, metric in metrics().items():
        if isinstance(metric, PerSet) and added:
            found[name] = metric.value(np.sum([one[name] for one in added], axis=0).tolist())
    return found
