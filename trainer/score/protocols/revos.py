"""ReVOS: J, F, accuracy A and robustness R, referring and reasoning sentences apart.

Follows cilinyan/VISA tools/eval_revos.py (ec158fd), its rounding and 8-bit arithmetic too. Sentences without a target
(type_id 2) are measured and enter no mean: R is how little was painted beside the target among the things that the
video's sentences name. The real files' rows of type_id 2 were not seen.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.protocols.answers import frame_scores, means

REFERRING, REASONING = 0, 1  # type_id
_NAMES = ("j", "f", "a", "r")


def expression(instances: Sequence[Mask], foreground: Mask, predicted: Mask | None) -> dict[str, float]:
    """j, f, a and r, fractions, of one sentence; None is a video without a prediction, which gets 0 for all.

    instances:  bool [T H W] of each annotation that the sentence means
    foreground: bool [T H W], the union of all that any sentence of the video means
    """
    if predicted is None:
        return dict.fromkeys(_NAMES, 0.0)
    truth = np.zeros(foreground.shape, np.uint8)
    for instance in instances:
        truth += instance  # 2 where two overlap, as in the public code
    j, f = frame_scores(truth > 0, predicted)
    accuracy = np.mean(truth == predicted.astype(np.uint8), axis=(1, 2))
    robust = [_robustness(*frame) for frame in zip(truth, foreground, predicted)]
    return {"j": float(np.mean(j)), "f": float(np.mean(f)), "a": float(np.mean(accuracy)), "r": float(np.mean(robust))}


def _robustness(truth: NDArray[np.uint8], foreground: Mask, predicted: Mask) -> float:
    """R of one frame: 1 less the predicted pixels beside the truth, as a share of the foreground's.

    8 bits: a predicted pixel where two instances overlap (truth 2) counts 255, not 0.
    """
    beside = int((predicted.astype(np.uint8) * (np.uint8(1) - truth)).sum(dtype=np.int64))
    return max(0.0, 1 - beside / (np.count_nonzero(foreground) + 1e-6))


def overall(items: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, dict[str, float | None]]:
    """In percent: (type_id, its numbers) -> referring, reason, and overall, the mean of these two whatever their sizes.

    Each expression is rounded to 0.01 % first, as in the public code.
    """
    rounded = [(kind, {name: round(100 * scores[name], 2) for name in _NAMES}) for kind, scores in items]
    table = {
        "referring": means([scores for kind, scores in rounded if kind == REFERRING], _NAMES),
        "reason": means([scores for kind, scores in rounded if kind == REASONING], _NAMES),
    }
    table["overall"] = {name: _middle(table["referring"][name], table["reason"][name]) for name in _NAMES}
    return {title: row | {"jf": _middle(row["j"], row["f"])} for title, row in table.items()}


def _middle(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else (one + other) / 2
