"""J&F: the mean of region similarity and boundary accuracy; benchmarks rank by it."""

from collections.abc import Mapping

from flowmask.trainer.score.metrics.base import Combined


class JAndF(Combined):
    """Mean of J and F of each expression."""

    title, order = "J&F", 0

    def of(self, scores: Mapping[str, float]) -> float:
        return (scores["j"] + scores["f"]) / 2
