"""Boundary accuracy F of DAVIS, per frame in float64; equal to MeViS's own numbers."""

import math

import numpy as np
from scipy.ndimage import distance_transform_edt

from flowmask.trainer.score.metrics.base import Mask, PerFrame

_TOLERANCE_OF_DIAGONAL = 0.008


class BoundaryAccuracy(PerFrame):
    """How well the outlines agree; a frame is compared at the size of its ground truth."""

    title, order = "F", 2

    def frame(self, truth: Mask, predicted: Mask) -> float:
        return boundary_accuracy(truth, predicted)


def boundary(mask: Mask) -> Mask:
    """Pixels of bool [H W] that differ from their right, lower or lower-right neighbour.

    The last row and column compare along themselves only; the last corner is never a boundary.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != diagonal)


def boundary_radius(height: int, width: int) -> int:
    """How far in pixels two boundaries may lie apart: 0.8 % of the frame's diagonal, rounded up."""
    return math.ceil(_TOLERANCE_OF_DIAGONAL * math.sqrt(height**2 + width**2))


def boundary_accuracy(truth: Mask, predicted: Mask) -> float:
    """F of two bool [H W]: harmonic mean of the precision and recall of boundary pixels within the radius."""
    edge_truth, edge_predicted = boundary(truth), boundary(predicted)
    if not edge_truth.any() or not edge_predicted.any():
        return float(edge_truth.any() == edge_predicted.any())
    radius = boundary_radius(*truth.shape)
    precision = _fraction_near(edge_predicted, edge_truth, radius)
    recall = _fraction_near(edge_truth, edge_predicted, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _fraction_near(edge: Mask, other: Mask, radius: int) -> float:
    """Share of `edge` pixels with an `other` pixel inside the disk x^2 + y^2 <= radius^2."""
    rows, columns = np.nonzero(edge)
    distance = distance_transform_edt(~other)[rows, columns]
    return np.count_nonzero(distance**2 <= radius**2 + 0.5) / len(rows)
