"""A2D-Sentences and JHMDB-Sentences: IoU and precision of the best answer, and average precision of all answers.

Follows wjn922/ReferFormer datasets/a2d_eval.py (06fc218) and its COCO settings; the average precision is pycocotools'.
Only annotated frames are samples. Fractions.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from flowmask.data_pipeline.formats import rle
from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.protocols import image_iou

_NAMES = ("map", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large")
Answered = Mapping[str, Any]


def answered(truth: Mask, masks: Sequence[Mask], scores: Sequence[float]) -> Answered:
    """One annotated frame and sentence, ready for JSON: the true mask bool [H W], and masks with their scores.

    The best is the mask of the highest score, of equal ones the last.
    """
    last_first = np.asarray(scores)[::-1]
    best = image_iou.overlap(truth, masks[len(last_first) - 1 - int(last_first.argmax())])
    return {
        "truth": _annotation(truth),
        "answers": [_annotation(mask) | {"score": float(score)} for mask, score in zip(masks, scores, strict=True)],
        "best": [best.intersection, best.union],
    }


def overall(samples: Mapping[str, Answered]) -> dict[str, float]:
    """o_iou, m_iou, precisions, map, ap_50, ap_75 and ap_{small, medium, large} (-1: no true mask of the size).

    samples: results of `answered`, by id; average precision uses the order of the ids
    """
    best = [image_iou.Overlap(*one["best"]) for one in samples.values()]
    return {**image_iou.overall(best, convention="referformer"), **_average_precision(samples)}


def _average_precision(samples: Mapping[str, Answered]) -> dict[str, float]:
    """COCO's, without categories and with one true mask per sample."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths, answers = [], []
    for number, (_, one) in enumerate(sorted(samples.items()), start=1):
        where = {"image_id": number, "category_id": 1}
        truths.append({**one["truth"], **where, "id": number, "iscrowd": 0})
        answers += [{**answer, **where} for answer in one["answers"]]
    with redirect_stdout(io.StringIO()):  # pycocotools prints
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


def _annotation(mask: Mask) -> dict[str, Any]:
    return {"segmentation": rle.encode(mask), "area": int(mask.sum())}
