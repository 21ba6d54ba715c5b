"""Boundary accuracy F of DAVIS, per frame in float64; equal to MeViS's own numbers."""

import math
from dataclasses import dataclass

import numpy as np

from flowmask.trainer.score.metrics.base import Mask, PerFrame

_TOLERANCE_OF_DIAGONAL = 0.008


class BoundaryAccuracy(PerFrame):
    """How well the outlines agree; a frame is compared at the size of its ground truth."""

    title, order = "F", 2

    def frame(self, truth: Mask, predicted: Mask) -> float:
        return boundary_accuracy(truth, predicted)


def boundary(mask: Mask) -> Mask:
    """Pixels of bool [H W] that differ from their right, lower or lower-right neighbour.

    The last row and column are compared only along themselves; the last corner is never a boundary.
    """
    found = np.zeros(mask.shape, dtype=bool)
    np.not_equal(mask[:, :-1], mask[:, 1:], out=found[:, :-1])
    found[:-1] |= mask[:-1] != mask[1:]
    found[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return found


def boundary_radius(height: int, width: int) -> int:
    """Largest distance in pixels between matching boundaries: 0.8 % of the frame's diagonal, rounded up."""
    return math.ceil(_TOLERANCE_OF_DIAGONAL * math.sqrt(height**2 + width**2))


def boundary_accuracy(truth: Mask, predicted: Mask) -> float:
    """F of two bool [H W]: harmonic mean of the precision and recall of boundary pixels within the radius."""
    radius = boundary_radius(*truth.shape)
    edges = [_Bits.of(boundary(mask), margin=radius) for mask in (truth, predicted)]
    if not all(edge.bits for edge in edges):
        return float(not any(edge.bits for edge in edges))
    recall, precision = (edge.fraction_near(other, radius) for edge, other in (edges, edges[::-1]))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True)
class _Bits:
    """Pixels as the bits of one integer, row after row: a shift moves all of them together.

    width: bits of a row; the bits after its pixels are 0, as a margin for horizontal shifts
    """

    bits: int
    width: int

    @classmethod
    def of(cls, mask: Mask, *, margin: int) -> "_Bits":
        height, width = mask.shape
        row_bytes = (width + margin + 7) // 8
        packed = np.zeros((height, row_bytes), dtype=np.uint8)
        packed[:, : (width + 7) // 8] = np.packbits(mask, axis=1, bitorder="little")
        return cls(int.from_bytes(packed.tobytes(), "little"), 8 * row_bytes)

    def fraction_near(self, other: "_Bits", radius: int) -> float:
        """Share of these pixels with one of the other's inside the disk x^2 + y^2 <= radius^2."""
        return (self.bits & other.dilated(radius)).bit_count() / self.bits.bit_count()

    def dilated(self, radius: int) -> int:
        """The bits of every pixel in the disk around one of these; some are outside of the frame, or in the margin."""
        wide, reach, found = self.bits, 0, 0
        for y in range(radius, -1, -1):
            while reach < math.isqrt(radius**2 - y**2):
                reach += 1
                wide |= self.bits << reach | self.bits >> reach
            found |= wide << y * self.width | wide >> y * self.width
        return found
