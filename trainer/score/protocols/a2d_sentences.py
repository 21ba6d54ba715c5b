"""A2D-Sentences: every annotated frame of every sentence is one sample; numbers as in `a2d_jhmdb`.

The benchmark's models give several masks with scores. FlowMask gives one mask. Its score is the mean probability of
its pixels, at the size of the clip and before the logits are clamped to -1..1; an empty mask scores 0. The score
affects only average precision.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.trainer.score.protocols import a2d_jhmdb
from flowmask.trainer.score.protocols.base import Answer, BenchmarkProtocol, Listener, Table

if TYPE_CHECKING:
    from torch import Tensor

    from flowmask.data_pipeline.clip.vae_clip import VaeClip

_UNDEFINED = -1  # returned by pycocotools if no true mask has the size


class Confidences(Listener):
    """The score of each sentence's mask in each frame."""

    def __init__(self) -> None:
        self.scores: dict[str, list[float]] = {}

    def hear(self, expression: Expression, logits: "Tensor", clip: "VaeClip") -> None:
        inside = logits[: clip.frames] > 0
        summed = (logits[: clip.frames].float().sigmoid() * inside).sum(dim=(1, 2))
        self.scores[expression.exp_id] = (summed / inside.sum(dim=(1, 2)).clamp(min=1)).tolist()


class A2dSentences(BenchmarkProtocol):
    """One table, of all samples."""

    conventions = ("referformer",)
    sources = ("a2d_sentences",)

    def listener(self, video: Video, folder: Path) -> Confidences:
        return Confidences()

    def of_video(self, video: Video, answers: Sequence[Answer], heard: Listener | None) -> dict[str, Any]:
        assert isinstance(heard, Confidences)
        return {
            answer.expression.exp_id: [
                a2d_jhmdb.answered(truth, [mask], [heard.scores[answer.expression.exp_id][i]])
                for ids, truths, masks in answer.pieces()
                for i, truth, mask in zip(ids, truths, masks, strict=True)
            ]
            for answer in answers
        }

    def overall(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
        every = [sample for record in records for samples in record.values() for sample in samples]
        found = a2d_jhmdb.overall({f"{place:012d}": sample for place, sample in enumerate(every)})
        percent = {name: None if value == _UNDEFINED else 100 * value for name, value in found.items()}
        return {"referformer": {"all": percent}}
