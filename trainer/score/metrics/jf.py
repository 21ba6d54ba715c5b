"""J&F: the mean of region similarity and boundary accuracy, the number that benchmarks rank by."""

from collections.abc import Mapping

from flowmask.trainer.score.metrics.base import Combined


class JAndF(Combined):
    """Of each expression."""

    title, order = "J&F", 0

    def of(self, scores: Mapping[str, float]) -> float:
        return (scores["j"] + scores["f"]) / 2
