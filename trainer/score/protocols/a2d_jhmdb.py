"""A2D-Sentences and JHMDB-Sentences: IoU and precision of the best answer, and average precision of all answers.

Follows wjn922/ReferFormer datasets/a2d_eval.py (06fc218) and its COCO settings; the average precision is pycocotools'.
Only annotated frames are samples. Fractions.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowmask.data_pipeline.formats import rle
from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.protocols import image_iou

_NAMES = ("map", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True)
class Answers:
    """One annotated frame and sentence: the true mask bool [H W], and masks bool [Q H W] with their scores [Q]."""

    truth: Mask
    masks: Mask
    scores: Sequence[float]

    @property
    def best(self) -> Mask:
        """The mask of the highest score, of equal ones the last."""
        last_first = np.asarray(self.scores)[::-1]
        return self.masks[len(last_first) - 1 - int(last_first.argmax())]


def overall(samples: Mapping[str, Answers]) -> dict[str, float]:
    """o_iou, m_iou, precisions, map, ap_50, ap_75 and ap_{small, medium, large} (-1: no true mask of the size)."""
    best = [image_iou.overlap(one.truth, one.best) for one in samples.values()]
    return {**image_iou.overall(best, convention="referformer"), **_average_precision(samples)}


def _average_precision(samples: Mapping[str, Answers]) -> dict[str, float]:
    """COCO's, with categories off and one true mask a sample; samples are taken in the order of their ids."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths, answers = [], []
    for number, (_, one) in enumerate(sorted(samples.items()), start=1):
        truths.append(_annotation(number, one.truth) | {"id": number, "iscrowd": 0})
        answers += [_annotation(number, mask) | {"score": float(s)} for mask, s in zip(one.masks, one.scores)]
    with redirect_stdout(io.StringIO()):  # it talks
        true = COCO()
        true.dataset = {
            "images": [
                dict(zip(("id", "height", "width"), (truth["id"], *truth["segmentation"]["size"]))) for truth in truths
            ],
            "annotations": truths,
            "categories": [{"id": 1}],
        }
        true.createIndex()
        judge = COCOeval(true, true.loadRes(answers), "segm")
        judge.params.useCats = 0
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(_NAMES, map(float, judge.stats)))


def _annotation(image: int, mask: Mask) -> dict[str, Any]:
    return {"image_id": image, "category_id": 1, "segmentation": rle.encode(mask), "area": int(mask.sum())}
