"""Ref-DAVIS17: a label map of each annotator from the probabilities of its sentences; numbers as in `davis`.

The probability of a pixel comes from the logit that decides its mask: clamped to -1..1 and resized. Among objects with
the same largest probability the lower one wins. The maps go to labels/<video>/<annotator>/<frame>.png: grey, the
object's number.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.models.errors import DataError
from flowmask.trainer.score.protocols import davis
from flowmask.trainer.score.protocols.base import Answer, BenchmarkProtocol, Listener, Table, in_percent

if TYPE_CHECKING:
    from torch import Tensor

    from flowmask.data_pipeline.clip.vae_clip import VaeClip

_FEWEST_FRAMES = 3  # the first and the last are left out in one convention
_FRAMES_AT_ONCE = 16


class Competition(Listener):
    """For each annotator and pixel the largest probability so far, and its label: 0 for none, else object + 1.

    labels: uint8 [annotator T H W], equal to `davis.fuse` for probabilities in float16
    """

    def __init__(self, video: Video, folder: Path) -> None:
        self.folder, self._names = folder, video.frame_names
        self._roles = dict(zip((e.exp_id for e in video.expressions), davis.roles(len(video.expressions))))
        shape = (davis.ANNOTATORS, len(video.frame_names), *video.size)
        self.labels, self._best = np.zeros(shape, np.uint8), np.zeros(shape, np.float16)

    def hear(self, expression: Expression, logits: "Tensor", clip: "VaeClip") -> None:
        from flowmask.models.segment import resize_logits

        for first in range(0, clip.frames, _FRAMES_AT_ONCE):
            some = resize_logits(logits[first : min(first + _FRAMES_AT_ONCE, clip.frames)], size=clip.original)
            self.take(expression, first, some.float().sigmoid().cpu().numpy())

    def take(self, expression: Expression, first: int, probabilities: NDArray[np.float32]) -> None:
        """Probabilities [n H W] of one sentence, from frame `first` on; sentences come in any order."""
        thing, annotator = self._roles[expression.exp_id]
        frames = slice(first, first + len(probabilities))
        labels, best = self.labels[annotator, frames], self._best[annotator, frames]
        rounded = probabilities.astype(np.float16)
        more = (rounded > best) | (rounded == best) & (thing + 1 < labels)
        wins = (probabilities >= davis.THRESHOLD) & more
        labels[wins], best[wins] = thing + 1, rounded[wins]

    def write(self) -> None:
        """Write the label maps."""
        for annotator, maps in enumerate(self.labels):
            (self.folder / str(annotator)).mkdir(parents=True, exist_ok=True)
            for name, one in zip(self._names, maps, strict=True):
                Image.fromarray(one).save(self.folder / str(annotator) / f"{name}.png", format="PNG")


class RefDavis17(BenchmarkProtocol):
    """A row for each annotator and their mean; `per_expression` has one row, over all sentences."""

    conventions = davis.CONVENTIONS
    sources = ("ref_davis17",)

    def refuse_video(self, video: Video, *, name: str) -> None:
        super().refuse_video(video, name=name)
        if wrong := _wrong(video):
            raise DataError(f"protocol is {name!r}; {video}: {wrong}; set protocol=null")

    def listener(self, video: Video, folder: Path) -> Competition:
        return Competition(video, folder)

    def of_video(self, video: Video, answers: Sequence[Answer], heard: Listener | None) -> dict[str, Any]:
        assert isinstance(heard, Competition)
        heard.write()
        truth = _truth(video)
        each = [{"j": float(np.mean(answer.j)), "f": float(np.mean(answer.f))} for answer in answers]
        return {"per_expression": each} | {
            convention: [davis.annotator(truth, labels, convention=convention) for labels in heard.labels]
            for convention in self.conventions
            if convention != "per_expression" and answers
        }

    def overall(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
        tables: dict[str, Table] = {}
        for convention in self.conventions[:2]:
            videos = [record[convention] for record in records if convention in record]
            rows, final = davis.overall([[thing for of_one in things for thing in of_one] for things in zip(*videos)])
            named = {f"annotator {number}": row for number, row in enumerate(rows)} | {"mean": final}
            tables[convention] = {title: in_percent(row) for title, row in named.items()}
        each = [entry for record in records for entry in record["per_expression"]]
        j, f = (float(np.mean([entry[name] for entry in each])) for name in ("j", "f"))
        return tables | {"per_expression": {"all": in_percent({"j": j, "f": f, "jf": (j + f) / 2})}}


def _truth(video: Video) -> davis.Labels:
    """The true label map uint8 [T H W]: object + 1 in the order of the sentences, 255 void (annotation 255)."""
    frames = range(len(video.frame_names))
    truth = np.zeros((len(frames), *video.size), np.uint8)
    for thing, expression in enumerate(video.expressions[:: davis.ANNOTATORS]):
        truth[video.mask(expression.anno_ids, frames)] = thing + 1
    truth[video.mask((str(davis.VOID),), frames)] = davis.VOID
    return truth


def _wrong(video: Video) -> str:
    """The reason why a video can't be scored; "" if it can."""
    if len(video.frame_names) < _FEWEST_FRAMES:
        return f"{len(video.frame_names)} frames, expected at least {_FEWEST_FRAMES}"
    roles = davis.roles(len(video.expressions))
    named = [video.expressions[davis.ANNOTATORS * thing].anno_ids for thing, _ in roles]
    for expression, own in zip(video.expressions, named):
        if len(own) != 1 or expression.anno_ids != own:
            said = ", ".join(expression.anno_ids) or "nothing"
            return f"expression {expression.exp_id} names {said}; expected four in a row that name one object"
    if len(named) > davis.ANNOTATORS * davis.MOST_LABELS:
        return f"{len(named) // davis.ANNOTATORS} objects, expected at most {davis.MOST_LABELS}"
    if named and not video.mask(named[-1], [0]).any():
        return f"object {named[-1][0]} is not in the first frame, by which the benchmark counts objects"
    return ""
