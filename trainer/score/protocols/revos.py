"""ReVOS: J, F, accuracy A and robustness R, for referring and reasoning sentences separately.

Follows cilinyan/VISA tools/eval_revos.py (ec158fd), with its rounding and 8-bit arithmetic. Sentences without a target
(type_id 2) are measured but count in no mean. R falls with the number of predicted pixels outside of the target,
relative to all objects of the video's sentences. Real files with rows of type_id 2 were not available.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.sources.base import Video
from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.protocols.answers import frame_scores, means
from flowmask.trainer.score.protocols.base import Answer, BenchmarkProtocol, Listener, Table, refuse_other_kinds

REFERRING, REASONING = 0, 1  # type_id
_KINDS = {"referring": REFERRING, "reasoning": REASONING, "no_target": 2}
_NAMES = ("j", "f", "a", "r")


class Revos(BenchmarkProtocol):
    """A row for each kind of sentence that has a target, and the mean of these rows."""

    conventions = ("visa",)
    sources = ("revos",)

    def refuse_video(self, video: Video, *, name: str) -> None:
        super().refuse_video(video, name=name)
        refuse_other_kinds(video, tuple(_KINDS), name=name)

    def of_video(self, video: Video, answers: Sequence[Answer], heard: Listener | None) -> dict[str, Any]:
        named = sorted({anno_id for expression in video.expressions for anno_id in expression.anno_ids})
        foreground: dict[int, int] = {}  # pixels of a frame's foreground, counted once for all sentences
        numbers = {}
        for answer in answers:
            frames = []
            for ids, _, predicted in answer.pieces():
                new = [i for i in ids if i not in foreground]
                foreground |= dict(zip(new, np.count_nonzero(video.mask(named, new), axis=(1, 2)).tolist()))
                instances = [video.mask([anno_id], ids) for anno_id in answer.expression.anno_ids]
                frames += _frames(instances, [foreground[i] for i in ids], predicted)
            kind = _KINDS[answer.expression.kind]
            numbers[answer.expression.exp_id] = {"type_id": kind, **_means(answer.j, answer.f, frames)}
        return numbers

    def overall(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
        return {"visa": overall([(entry["type_id"], entry) for record in records for entry in record.values()])}


def expression(instances: Sequence[Mask], foreground: Mask, predicted: Mask | None) -> dict[str, float]:
    """j, f, a and r, fractions, of one sentence; None is a video without a prediction, which gets 0 in all.

    instances:  bool [T H W] of each annotation of the sentence
    foreground: bool [T H W], the union of the annotations of all sentences of the video
    """
    if predicted is None:
        return dict.fromkeys(_NAMES, 0.0)
    union = np.any(np.asarray(instances, dtype=bool).reshape(-1, *foreground.shape), axis=0)
    j, f = frame_scores(union, predicted)
    return _means(j, f, _frames(instances, np.count_nonzero(foreground, axis=(1, 2)), predicted))


def _means(j: Sequence[float], f: Sequence[float], frames: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The numbers of one sentence from those of its frames."""
    a, r = zip(*frames)
    return {name: float(np.mean(values)) for name, values in zip(_NAMES, (j, f, a, r))}


def _frames(instances: Sequence[Mask], foreground: Sequence[int], predicted: Mask) -> list[tuple[float, float]]:
    """A and R of each frame of bool [n H W]; `foreground` has the pixel count of each frame's foreground."""
    truth = np.zeros(predicted.shape, np.uint8)
    for instance in instances:
        truth += instance  # 2 where two instances overlap, as in the public code
    said = predicted.astype(np.uint8)
    accuracy = np.mean(truth == said, axis=(1, 2)).tolist()
    return [(a, _robustness(*frame)) for a, frame in zip(accuracy, zip(truth, foreground, said))]


def _robustness(truth: NDArray[np.uint8], foreground: int, predicted: NDArray[np.uint8]) -> float:
    """R of one frame: 1 minus the predicted pixels outside of the truth, as a share of the foreground.

    8 bits: a predicted pixel where two instances overlap (truth 2) counts 255, not 0.
    """
    beside = int((predicted * (np.uint8(1) - truth)).sum(dtype=np.int64))
    return max(0.0, 1 - beside / (foreground + 1e-6))


def overall(items: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, dict[str, float | None]]:
    """In percent: (type_id, its numbers) -> referring, reason, and overall, the unweighted mean of these two.

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
