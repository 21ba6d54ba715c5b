"""gRefCOCO (GRES): IoU with sentences without a target, and the accuracy of empty answers.

Follows henghuiding/ReLA gres_model/evaluation/refer_evaluation.py (3ca9551). A model without a
no-target head answers "nothing" by an empty mask. Open question: whether the tables for models without a head remove
small masks first. Percentages, except n_acc and t_acc, which are fractions as in ReLA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flowmask.data_pipeline.sources.base import Video, names_nothing
from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.protocols.base import Answer, PerAnswer, Table
from flowmask.trainer.score.protocols.image_iou import Overlap, of_pieces, overlap

THRESHOLDS = (0.7, 0.8, 0.9)


class Grefcoco(PerAnswer):
    """An empty mask says "nothing"; all numbers in percent."""

    conventions = ("empty_mask",)
    sources = ("refcoco",)

    def of_answer(self, video: Video, answer: Answer) -> dict[str, Any]:
        return {
            **asdict(of_pieces(answer.pieces())),
            "has_target": not names_nothing(video, answer.expression),
            "says_nothing": not answer.answered,
        }

    def tables(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
        found = overall(
            [
                Sample(Overlap(entry["intersection"], entry["union"]), entry["has_target"], entry["says_nothing"])
                for entry in entries
            ]
        )
        return {"empty_mask": {"all": found | {name: 100 * found[name] for name in ("n_acc", "t_acc")}}}


@dataclass(frozen=True)
class Sample:
    """One sentence: overlap of the masks, whether it has a target, and whether the answer is "nothing"."""

    overlap: Overlap
    has_target: bool
    says_nothing: bool

    @property
    def iou(self) -> float:
        """Its IoU in gIoU: 1 for a correct "nothing", 0 for a wrong answer about the target."""
        if self.has_target == self.says_nothing:
            return 0.0
        if not self.has_target:
            return 1.0
        return self.overlap.intersection / self.overlap.union if self.overlap.union else 0.0


def sample(truth: Mask, predicted: Mask, *, has_target: bool, says_nothing: bool | None = None) -> Sample:
    """One sample from two bool [H W]; says_nothing: answer of the model's no-target head.

    None: derived from an empty mask.
    """
    nothing = not predicted.any() if says_nothing is None else says_nothing
    return Sample(overlap(truth, predicted), has_target, nothing)


def overall(samples: Sequence[Sample]) -> dict[str, float]:
    """g_iou, c_iou, precision_0.7 ... 0.9 (of the sentences with a target), n_acc and t_acc of at least one sample.

    Without any no-target sentence both accuracies are 0, as in the public code.
    """
    target = [one for one in samples if one.has_target]
    nothing = [one for one in samples if not one.has_target]
    counted = [one for one in samples if one.has_target or not one.says_nothing]
    inside = sum(0 if one.says_nothing else one.overlap.intersection for one in counted)
    outside = sum(one.overlap.union for one in counted)
    found = {
        "g_iou": 100 * float(np.mean([one.iou for one in samples])),
        "c_iou": 100 * inside / outside if outside else 0.0,
        "n_acc": _share([one.says_nothing for one in nothing]),
        "t_acc": _share([not one.says_nothing for one in target]) if nothing else 0.0,
    }
    return found | {f"precision_{t}": 100 * _share([one.iou >= t for one in target]) for t in THRESHOLDS}


def _share(answers: Sequence[bool]) -> float:
    return float(np.mean(answers)) if answers else 0.0
