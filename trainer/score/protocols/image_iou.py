"""RefCOCO, RefCOCO+ and RefCOCOg: overall and mean IoU and precision at thresholds, in three conventions.

    referformer   (I + 1e-6) / (U + 1e-6) in float32, strictly above t; two empty masks give 1; default; A2D's too
    lavt          I / U in float64, t or more; two empty masks give 0
    sa2va         I / (U + 1e-5) in float32; called gIoU and cIoU; no precisions (LISA-style code)

Follows wjn922/ReferFormer datasets/a2d_eval.py (06fc218), yz93/LAVT-RIS test.py (1da0af9) and bytedance/Sa2VA RES.py
(9832e1a). LAVT scores at 480 x 480; here masks are scored at their given size. Fractions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowmask.models.errors import ConfigError
from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.protocols.base import JudgedPiece

CONVENTIONS = ("referformer", "lavt", "sa2va")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Overlap:
    """The numbers of pixels of one sample in both masks, and in either."""

    intersection: int
    union: int


def overlap(truth: Mask, predicted: Mask) -> Overlap:
    """The overlap of two bool masks of the same shape."""
    return Overlap(int(np.count_nonzero(truth & predicted)), int(np.count_nonzero(truth | predicted)))


def of_pieces(pieces: Iterable[JudgedPiece]) -> Overlap:
    """The overlap over all frames; an image has one frame."""
    found = [overlap(truth, predicted) for _, truth, predicted in pieces]
    return Overlap(sum(one.intersection for one in found), sum(one.union for one in found))


def ious(items: Sequence[Overlap], *, convention: str) -> NDArray[np.floating]:
    """IoU [samples] of each sample, in the precision of the convention; ConfigError for an unknown one."""
    inside = np.array([item.intersection for item in items], np.float64)
    outside = np.array([item.union for item in items], np.float64)
    if convention == "lavt":
        return np.divide(inside, outside, out=np.zeros_like(inside), where=outside > 0)
    inside32, outside32 = inside.astype(np.float32), outside.astype(np.float32)
    if convention == "referformer":
        return (inside32 + np.float32(1e-6)) / (outside32 + np.float32(1e-6))
    if convention == "sa2va":
        return np.where(outside32 == 0, np.float32(1), inside32 / (outside32 + np.float32(1e-5)))
    raise ConfigError(f"convention is {convention!r}; known: {', '.join(CONVENTIONS)}")


def overall(items: Sequence[Overlap], *, convention: str) -> dict[str, float]:
    """o_iou, m_iou and, except for sa2va, precision_0.5 ... 0.9 of at least one sample."""
    each = ious(items, convention=convention).astype(np.float64)
    inside, outside = sum(item.intersection for item in items), sum(item.union for item in items)
    found = {"o_iou": inside / outside if outside else 0.0, "m_iou": float(each.mean())}
    if convention == "sa2va":
        return found
    passes = np.greater_equal if convention == "lavt" else np.greater
    return found | {f"precision_{t}": float(passes(each, t).mean()) for t in THRESHOLDS}
