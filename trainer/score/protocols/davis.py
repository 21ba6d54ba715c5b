"""The scoring of Ref-DAVIS17: four annotators, whose objects compete for each pixel; three conventions.

    unsupervised      all frames, void left out, labels matched to objects, as in ReferFormer's script; the default
    semi_supervised   without the first and the last frame, label k against object k, void is background
    per_expression    every sentence's own mask against its object, no competition (VISA tools/eval_davis17.py)

They differ by up to six points on one set of masks. Follows davisvideochallenge/davis2017-evaluation (ac7c43f),
wjn922/ReferFormer (06fc218) and cilinyan/VISA (ec158fd). Two differences: the frames of the decay are not counted
in 8 bits, which matters above 256 frames; and a predicted label that no object has is refused, where the package
ends the program. Fractions.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from flowmask.models.errors import DataError
from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.protocols.answers import Agreement, agreement, frame_scores

ANNOTATORS, VOID = 4, 255
CONVENTIONS = ("unsupervised", "semi_supervised", "per_expression")
THRESHOLD, _BACKGROUND = 0.5, 0.1
MOST_LABELS = 20
Labels = NDArray[np.uint8]
_NAMES = ("j", "j_recall", "j_decay", "f", "f_recall", "f_decay")


def roles(expressions: int) -> list[tuple[int, int]]:
    """(object, annotator), from 0, of each expression by its place in the file; DataError: not in fours."""
    if expressions % ANNOTATORS:
        raise DataError(f"{expressions} expressions: Ref-DAVIS17 has one of each of {ANNOTATORS} annotators an object")
    return [divmod(place, ANNOTATORS) for place in range(expressions)]


def fuse(probabilities: NDArray[np.floating]) -> Labels:
    """Label map uint8 [T H W] of one annotator's objects [N T H W]: the largest probability of 0.5 or more wins.

    Among equal ones the lower object wins; if none reaches 0.5 the background (0) wins.
    """
    kept = np.where(probabilities < THRESHOLD, 0, probabilities)
    planes = np.concatenate([np.full_like(kept[:1], _BACKGROUND), kept])
    return planes.argmax(axis=0).astype(np.uint8)


def expression(truth: Labels, thing: int, predicted: Mask) -> Agreement:
    """J and F of one sentence's own mask bool [T H W] against object `thing`, from 0, as in `per_expression`."""
    return agreement(truth == thing + 1, predicted)


def annotator(truth: Labels, predicted: Labels, *, convention: str) -> list[dict[str, float]]:
    """Numbers of each object of one video, from two label maps uint8 [T H W].

    In `unsupervised` they are in the order of the predicted labels that they were matched to.
    """
    void = truth == VOID
    objects = int(np.where(void, 0, truth)[0].max())
    if convention == "semi_supervised":
        return [_object(*pair) for pair in _same_labels(truth[1:-1], predicted[1:-1], objects)]
    seen = np.where(void, 0, predicted)
    return _matched([truth == k + 1 for k in range(objects)], _planes(seen, at_least=objects, limit=MOST_LABELS))


def _same_labels(truth: Labels, predicted: Labels, objects: int) -> list[tuple[Mask, Mask]]:
    if predicted.max(initial=0) > objects:
        raise DataError(f"predicted label {predicted.max()}, but the video has {objects} objects")
    return [(truth == k + 1, predicted == k + 1) for k in range(objects)]


def _planes(labels: Labels, *, at_least: int, limit: int) -> list[Mask]:
    highest = int(labels.max(initial=0))
    if highest > limit:
        raise DataError(f"predicted label {highest}; at most {limit} are scored")
    return [labels == k + 1 for k in range(max(highest, at_least))]


def _matched(truths: Sequence[Mask], predictions: Sequence[Mask]) -> list[dict[str, float]]:
    """Match each object to a distinct label, so that the sum of (J + F) / 2 is largest."""
    pairs = [[_object(truth, predicted) for truth in truths] for predicted in predictions]
    worth = np.array([[(pair["j"] + pair["f"]) / 2 for pair in row] for row in pairs])
    labels, objects = linear_sum_assignment(-worth.reshape(len(predictions), len(truths)))
    return [pairs[label][thing] for label, thing in zip(labels, objects)]


def _object(truth: Mask, predicted: Mask) -> dict[str, float]:
    """Mean, recall and decay of J and F of one object, two bool [T H W]."""
    j, f = frame_scores(truth, predicted)
    return dict(zip(_NAMES, (*_statistics(j), *_statistics(f))))


def _statistics(frames: Sequence[float]) -> tuple[float, float, float]:
    """(mean, share of frames above 0.5, mean of the first quarter less that of the last)."""
    values = np.asarray(frames)
    edges = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    return float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())


def overall(annotators: Sequence[Sequence[Mapping[str, float]]]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """(each annotator's means over all objects of all videos, the mean of these): `_NAMES` and jf."""
    means = [{name: float(np.mean([thing[name] for thing in things])) for name in _NAMES} for things in annotators]
    each = [row | {"jf": (row["j"] + row["f"]) / 2} for row in means]
    return each, {name: float(np.mean([row[name] for row in each])) for name in each[0]}
