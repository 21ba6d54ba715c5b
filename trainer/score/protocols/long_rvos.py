"""Long-RVOS: J and F, temporal overlap (tIoU) and spatio-temporal overlap (vIoU), by kind of sentence.

Follows iSEE-Laboratory/Long_RVOS eval/eval_long_rvos (447682a). Fractions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowmask.data_pipeline.sources.base import Video
from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.protocols.answers import frame_scores, means
from flowmask.trainer.score.protocols.base import Answer, PerAnswer, Table, in_percent, refuse_other_kinds

KINDS = {"static": "static", "dynamic": "dynamic", "static+dynamic": "hybrid"}  # in the files -> in the tables
_NAMES = ("j", "f", "jf", "t_iou", "v_iou")


class LongRvos(PerAnswer):
    """A row for each kind of sentence, and one over all."""

    conventions = ("long_rvos",)
    sources = ("long_rvos",)

    def refuse_video(self, video: Video, *, name: str) -> None:
        super().refuse_video(video, name=name)
        refuse_other_kinds(video, tuple(KINDS), name=name)

    def of_answer(self, video: Video, answer: Answer) -> dict[str, Any]:
        shown = [(t.any(), p.any()) for _, truth, predicted in answer.pieces() for t, p in zip(truth, predicted)]
        seen, said = np.array(shown, dtype=bool).T
        return {"kind": answer.expression.kind, **of_frames(answer.j, answer.f, seen=seen, said=said)}

    def tables(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
        table = overall([(entry["kind"], entry) for entry in entries])
        return {"long_rvos": {title: in_percent(row) for title, row in table.items()}}


def expression(truth: Mask, predicted: Mask | None) -> dict[str, float]:
    """All numbers of two bool [T H W]; None is a video without a prediction, which gets 0 in all numbers."""
    if predicted is None:
        return dict.fromkeys(_NAMES, 0.0)
    j, f = frame_scores(truth, predicted)
    seen, said = (np.asarray(masks.any(axis=(1, 2))) for masks in (truth, predicted))
    return of_frames(j, f, seen=seen, said=said)


def of_frames(j: Sequence[float], f: Sequence[float], *, seen: Mask, said: Mask) -> dict[str, float]:
    """j, f, jf, t_iou and v_iou from each frame's J and F, and from bool [T]: whether truth and prediction have a
    pixel.

    t_iou compares the sets of frames with a mask; v_iou sums J over frames with both. Both are 1 if neither has a mask.
    """
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
