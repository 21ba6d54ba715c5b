"""RefCOCO, RefCOCO+ and RefCOCOg: overall and mean IoU and precisions, a table for each convention of `image_iou`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flowmask.data_pipeline.sources.base import Video
from flowmask.trainer.score.protocols.base import Answer, PerAnswer, Table, in_percent
from flowmask.trainer.score.protocols.image_iou import CONVENTIONS, Overlap, of_pieces, overall


class Refcoco(PerAnswer):
    """Every sentence is one sample; LAVT's table is not at its 480 x 480, but at the images' own sizes."""

    conventions = CONVENTIONS
    sources = ("refcoco",)

    def of_answer(self, video: Video, answer: Answer) -> dict[str, Any]:
        return asdict(of_pieces(answer.pieces()))

    def tables(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
        items = [Overlap(**entry) for entry in entries]
        return {name: {"all": in_percent(overall(items, convention=name))} for name in self.conventions}
