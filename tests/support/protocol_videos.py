"""The golden sets of benchmarks as videos in memory, with their predictions as an evaluation gives them.

Some videos have no prediction in a set. An evaluation can't make their records; the pure functions make them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol_sets import load

from flowmask.data_pipeline.clip.vae_clip import VaeClip
from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.trainer.score.judging import Judge
from flowmask.trainer.score.mask_places import MaskMemory
from flowmask.trainer.score.protocols import a2d_jhmdb, davis, long_rvos, protocol_named, revos
from flowmask.trainer.score.protocols.answers import agreement
from flowmask.trainer.score.protocols.ref_davis17 import Competition

GOLDEN = Path(__file__).parents[1] / "golden" / "protocols"
_REVOS_KINDS = ("referring", "reasoning", "no_target")


class HeldVideo(Video):
    """Masks bool [T H W] of each annotation, and the predicted masks of each expression."""

    has_masks = True

    def __init__(self, video_id: str, masks: Mapping[str, Any], said: Mapping[Expression, Any]) -> None:
        self.video_id, self.masks = video_id, {name: np.asarray(mask) > 0 for name, mask in masks.items()}
        self.said = {expression: np.asarray(mask) > 0 for expression, mask in said.items()}
        self.expressions = tuple(said)
        self.shape = next(iter(self.said.values())).shape
        self.frame_names = tuple(f"{i:05d}" for i in range(self.shape[0]))

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1:]

    def frames(self, ids: Sequence[int]) -> list[Any]:
        raise NotImplementedError

    def files_digest(self) -> str:
        raise NotImplementedError

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> Any:
        union = np.zeros((len(ids), *self.size), bool)
        for anno_id in anno_ids:
            union |= self.masks[anno_id][list(ids)]
        return union


@dataclass
class Answered:
    """One protocol's set: videos, the records of those without a prediction, confidences by (video, expression)."""

    name: str
    videos: list[HeldVideo] = field(default_factory=list)
    missing: list[dict[str, Any]] = field(default_factory=list)
    logits: dict[tuple[str, str], float] = field(default_factory=dict)
    probabilities: dict[tuple[str, str], Any] = field(default_factory=dict)

    def record(self, video: HeldVideo, folder: Path) -> dict[str, Any]:
        """A video's record, as it is read again; masks are written and scored as in an evaluation."""
        protocol = protocol_named(self.name)
        protocol.refuse_video(video, name=self.name)
        heard = protocol.listener(video, folder / "labels")
        frames = len(video.frame_names)
        places = {expression.exp_id: MaskMemory() for expression in video.expressions}
        judge = Judge(video, places)
        for expression, masks in video.said.items():
            for name, mask in zip(video.frame_names, masks):
                places[expression.exp_id].write(name, mask)
            judge.right(expression, {"answered": bool(masks.any())}, [(range(frames), masks)])
            if isinstance(heard, Competition):  # takes probabilities that no logit between -1 and 1 has
                heard.take(expression, 0, self.probabilities[video.video_id, expression.exp_id])
            elif heard is not None:
                logits = torch.full((frames, 1, 1), self.logits[video.video_id, expression.exp_id])
                heard.hear(expression, logits, VaeClip(np.empty(0, np.uint8), frames, (1, 1), (1, 1), "half"))
        answers = [judge.answers[expression.exp_id] for expression in video.expressions]
        return json.loads(json.dumps(protocol.of_video(video, answers, heard), allow_nan=False))


def mevis_set() -> Answered:
    inputs, meta = load(GOLDEN / "mevis")
    result = Answered("mevis")
    for video in meta["videos"]:
        sentences = [Expression(e, "x", tuple(map(str, x["anno_id"]))) for e, x in video["expressions"].items()]
        masks = {anno_id: inputs[f"anno/{anno_id}"] for e in sentences for anno_id in e.anno_ids}
        if video["missing"]:
            nothing = np.zeros((1, 1, 1), bool)
            found = {e.exp_id: asdict(agreement(nothing, None, has_target=bool(e.anno_ids))) for e in sentences}
            result.missing.append(found)
        else:
            _add(result, video["name"], masks, sentences, inputs)
    return result


def revos_set() -> Answered:
    inputs, meta = load(GOLDEN / "revos")
    result = Answered("revos")
    for video in meta["videos"]:
        sentences = [
            Expression(e, "x", tuple(map(str, x["anno_id"])), _REVOS_KINDS[x["type_id"]])
            for e, x in video["expressions"].items()
        ]
        masks = {anno_id: inputs[f"anno/{anno_id}"] for e in sentences for anno_id in e.anno_ids}
        if video["missing"]:
            zeros = revos.expression([], np.zeros((1, 1, 1), bool), None)
            result.missing.append({e.exp_id: {"type_id": _REVOS_KINDS.index(e.kind), **zeros} for e in sentences})
        else:
            _add(result, video["name"], masks, sentences, inputs)
    return result


def long_rvos_set() -> Answered:
    inputs, meta = load(GOLDEN / "long_rvos")
    result = Answered("long_rvos")
    for video in meta["videos"]:
        sentences = [Expression(e, "x", (x["obj_id"],), x["type"]) for e, x in video["expressions"].items()]
        masks = {e.anno_ids[0]: inputs[f"gt/{video['name']}/{e.anno_ids[0]}"] for e in sentences}
        if video["missing"]:
            zeros = long_rvos.expression(np.zeros((1, 1, 1), bool), None)
            result.missing.append({e.exp_id: {"kind": e.kind, **zeros} for e in sentences})
        else:
            _add(result, video["name"], masks, sentences, inputs)
    return result


def _add(result: Answered, name: str, masks: Mapping[str, Any], sentences: Sequence[Expression], inputs: Any) -> None:
    result.videos.append(HeldVideo(name, masks, {e: inputs[f"pred/{name}/{e.exp_id}"] for e in sentences}))


def image_set(folder: str, protocol: str, *, source: str | None = None) -> Answered:
    """Images with one sentence each. Of several masks with scores, the best is kept, and its score becomes a logit."""
    inputs, meta = load(GOLDEN / folder)
    result = Answered(protocol)
    for item in meta["items"]:
        if source is None or item["source"] == source:
            key, predicted = item["id"], inputs[f"pred/{item['id']}"]
            if predicted.ndim == 3:
                scores = inputs[f"score/{key}"]
                best = len(scores) - 1 - int(scores[::-1].argmax())
                predicted, result.logits[key, "0"] = predicted[best], 1 + len(result.logits) / 1000
            expression = Expression("0", "x", () if item.get("gt_no_target") else ("0",))
            result.videos.append(HeldVideo(key, {"0": inputs[f"gt/{key}"][None]}, {expression: predicted[None]}))
    return result


def davis_set() -> Answered:
    inputs, meta = load(GOLDEN / "ref_davis17")
    result = Answered("ref_davis17")
    for video in meta["videos"]:
        name, labels = video["name"], inputs[f"{video['name']}/labels"]
        prob = inputs[f"{name}/prob"] / np.float32(meta["prob_scale"])
        said = {}
        for place, (thing, annotator) in enumerate(davis.roles(len(video["expressions"]))):
            expression = Expression(str(place), "x", (str(thing + 1),))
            result.probabilities[name, expression.exp_id] = prob[annotator, thing]
            said[expression] = prob[annotator, thing] >= davis.THRESHOLD
        masks = {str(label): labels == label for label in (*range(1, video["objects"] + 1), davis.VOID)}
        result.videos.append(HeldVideo(name, masks, said))
    return result


def a2d_wanted(answered: Answered) -> dict[str, float]:
    """The result of the pure functions for the same single masks."""
    samples = {}
    for video in answered.videos:
        ((_, masks),) = video.said.items()
        score = torch.tensor(answered.logits[video.video_id, "0"]).sigmoid().item()
        samples[video.video_id] = a2d_jhmdb.answered(video.masks["0"][0], [masks[0]], [score])
    return a2d_jhmdb.overall(samples)


SETS = {
    "mevis": mevis_set,
    "revos": revos_set,
    "long_rvos": long_rvos_set,
    "refcoco": lambda: image_set("refcoco", "refcoco"),
    "grefcoco": lambda: image_set("grefcoco", "grefcoco", source="grefcoco"),
    "a2d_sentences": lambda: image_set("a2d_jhmdb", "a2d_sentences"),
    "ref_davis17": davis_set,
    "jhmdb_sentences": lambda: image_set("a2d_jhmdb", "jhmdb_sentences"),
}
