"""The overall IoU: intersections of all frames over unions of all frames."""

from collections.abc import Sequence

import numpy as np

from flowmask.trainer.score.metrics.base import Mask, PerSet


class OverallIou(PerSet):
    """In percent; 100 where neither any truth nor any prediction shows a pixel."""

    title = "overall IoU"

    def frame(self, truth: Mask, predicted: Mask) -> tuple[int, int]:
        """What a frame of bool [H W] adds: pixels of the intersection and of the union."""
        return np.count_nonzero(truth & predicted), np.count_nonzero(truth | predicted)

    def value(self, sums: Sequence[float]) -> float:
        """The value of the sums over frames and expressions."""
        return 100 * sums[0] / sums[1] if sums[1] else 100.0
