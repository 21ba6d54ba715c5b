"""Region similarity J of DAVIS, per frame in float64; equal to MeViS's own numbers."""

import numpy as np

from flowmask.trainer.score.metrics.base import Mask, PerFrame


class RegionSimilarity(PerFrame):
    """Intersection over union; a frame is compared at the size of its ground truth."""

    title, order = "J", 1

    def frame(self, truth: Mask, predicted: Mask) -> float:
        return region_similarity(truth, predicted)


def region_similarity(truth: Mask, predicted: Mask) -> float:
    """J of two bool [H W]: intersection over union, 1 when both are empty."""
    union = np.count_nonzero(truth | predicted)
    return np.count_nonzero(truth & predicted) / union if union else 1.0
