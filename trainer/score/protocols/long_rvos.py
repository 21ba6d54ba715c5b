"""Long-RVOS: J and F, and whether the object was found when it is there (tIoU) and where (vIoU), by kind of sentence.

Follows iSEE-Laboratory/Long_RVOS eval/eval_long_rvos (447682a). Fractions.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.protocols.answers import frame_scores, means

KINDS = {"static": "static", "dynamic": "dynamic", "static+dynamic": "hybrid"}  # in the files -> in the tables
_NAMES = ("j", "f", "jf", "t_iou", "v_iou")


def expression(truth: Mask, predicted: Mask | None) -> dict[str, float]:
    """j, f, t_iou and v_iou of two bool [T H W]; None is a video without a prediction, which gets 0 for all.

    t_iou compares the frames in which something is seen; v_iou sums J over those of both. Nothing seen anywhere is 1.
    """
    if predicted is None:
        return dict.fromkeys(_NAMES, 0.0)
    j, f = frame_scores(truth, predicted)
    seen, said = truth.any(axis=(1, 2)), predicted.any(axis=(1, 2))
    either = np.count_nonzero(seen | said)
    found = {"j": float(np.mean(j)), "f": float(np.mean(f))}
    return found | {
        "jf": (found["j"] + found["f"]) / 2,
        "t_iou": np.count_nonzero(seen & said) / either if either else 1.0,
        "v_iou": float(np.sum(np.asarray(j)[seen & said])) / either if either else 1.0,
    }


def overall(items: Sequence[tuple[str, Mapping[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Means of each kind of sentence, and over all expressions: (type as in the files, its numbers) -> table."""
    table = {title: means([scores for kind, scores in items if kind == name], _NAMES) for name, title in KINDS.items()}
    return table | {"overall": means([scores for _, scores in items], _NAMES)}
