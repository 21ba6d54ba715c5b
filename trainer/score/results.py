"""From the records of single videos to the scores of a dataset, and the report that shows them.

Means are taken over (video, expression id), each counted once however often its sentence occurs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowmask.data_pipeline.show.page import spread
from flowmask.data_pipeline.sources.base import Video
from flowmask.trainer.predict.overlay import read_mask
from flowmask.trainer.score.archive import FILE as ARCHIVE
from flowmask.trainer.score.archive import write_archive
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.overlays import write_overlays
from flowmask.trainer.score.report import ReportExample, ReportRow, write_report
from flowmask.trainer.score.store import REPORT
from flowmask.trainer.track.tracking import offer_artifact

NO_MASKS = "The dataset has no masks: masks/ holds the predictions, but no score is possible."
_SHEET_FRAMES = 6


@dataclass(frozen=True)
class Scores:
    """What scores.json holds; j, f, jf in 0..100, None where the dataset has no masks.

    per_expression: `video/expression id` -> j, f, jf
    shuffled_text:  jf_right with the right, jf_shuffled with the wrong sentences, of the same expressions
    decoder:        j, f, jf of the true masks after the VAE and the mask decoder: the method's ceiling
    """

    j: float | None
    f: float | None
    jf: float | None
    per_expression: dict[str, dict[str, float]]
    videos: int
    expressions: int
    frames: int
    shuffled_text: dict[str, Any] | None
    decoder: dict[str, float] | None
    checkpoint: str
    weights: dict[str, str]
    note: str
    fingerprint: str = ""  # of all that shaped them: settings, dataset, weights


def merge(
    videos: Sequence[Video], records: Sequence[Mapping[str, Any]], *, checkpoint: str, weights: Mapping[str, str]
) -> Scores:
    """Scores of a dataset from each video's record, in the order of the videos."""
    entries = {
        f"{video.video_id}/{exp_id}": entry
        for video, record in zip(videos, records)
        for exp_id, entry in record["expressions"].items()
    }
    right = {key: entry["right"] for key, entry in entries.items() if "right" in entry}
    total = _mean(right.values())
    both = {key: entry for key, entry in entries.items() if "wrong" in entry}
    shuffled = None
    if both:
        shuffled = {
            "expressions": len(both),
            "jf_right": _mean([entry["right"] for entry in both.values()])["jf"],
            "jf_shuffled": _mean([entry["wrong"] for entry in both.values()])["jf"],
        }
    decoder = [entry["decoder"] for entry in entries.values() if "decoder" in entry]
    return Scores(
        j=total.get("j"),
        f=total.get("f"),
        jf=total.get("jf"),
        per_expression=right,
        videos=len(videos),
        expressions=len(entries),
        frames=sum(record["frames"] for record in records),
        shuffled_text=shuffled,
        decoder=_mean(decoder) or None,
        checkpoint=checkpoint,
        weights=dict(weights),
        note="" if right else NO_MASKS,
    )


def _mean(scores: Any) -> dict[str, float]:
    """The mean of each of j, f and jf; empty for no scores."""
    scores = list(scores)
    return {name: float(np.mean([score[name] for score in scores])) for name in ("j", "f", "jf") if scores}


def finish(
    config: EvaluateConfig,
    *,
    videos: Sequence[Video],
    masks: Path,
    records: Sequence[Mapping[str, Any]],
    weights: Mapping[str, str],
) -> dict[str, Any]:
    """Merge all records, write the report and its overlay videos, return what scores.json holds.

    masks: the published folder. The MLflow run of a checkpoint that has one is left the report and the videos.
    """
    scores = merge(videos, records, checkpoint=config.checkpoint, weights=weights)
    texts = {f"{video.video_id}/{e.exp_id}": e.text for video in videos for e in video.expressions}
    rows = [ReportRow(key, texts[key], **entry) for key, entry in scores.per_expression.items()]
    examples = _examples(config, videos, masks, scores)
    write_report(
        config.out / REPORT,
        title="FlowMask evaluation",
        facts=_facts(config, scores),
        rows=rows,
        examples=examples,
        note=scores.note,
    )
    keys = [example.key for example in examples]
    for made in (config.out / REPORT, write_overlays(config.out, keys, videos=videos, masks=masks)):
        offer_artifact(config.checkpoint, made, to="evaluation")
    (config.out / ARCHIVE).unlink(missing_ok=True)  # of other masks
    if config.archive is not None:
        write_archive(config.out, masks=masks, layout=config.archive)
    return asdict(scores)


def _facts(config: EvaluateConfig, scores: Scores) -> dict[str, str]:
    named = {"J&F": scores.jf, "J": scores.j, "F": scores.f}
    if scores.shuffled_text:
        named["J&F with the wrong sentences"] = scores.shuffled_text["jf_shuffled"]
    if scores.decoder:
        named["J&F of the mask decoder alone"] = scores.decoder["jf"]
    return {name: f"{value:.1f}" for name, value in named.items() if value is not None} | {
        "videos": str(scores.videos),
        "expressions": str(scores.expressions),
        "Euler steps": str(config.sampler.steps),
        "weights": "averaged (EMA)" if config.ema else "last step",
        "checkpoint": config.checkpoint,
    }


def _examples(config: EvaluateConfig, videos: Sequence[Video], masks: Path, scores: Scores) -> list[ReportExample]:
    """Expressions from the worst to the best, evenly spread over the ranking."""
    pairs = {f"{video.video_id}/{e.exp_id}": (video, e) for video in videos for e in video.expressions}
    ranked = sorted(pairs, key=lambda key: (scores.per_expression.get(key, {"jf": 0.0})["jf"], key))
    examples = []
    for place in spread(len(ranked), config.report_examples):
        key = ranked[place]
        video, expression = pairs[key]
        ids = spread(len(video.frame_names), _SHEET_FRAMES)
        names = [video.frame_names[i] for i in ids]
        score = scores.per_expression.get(key)
        examples.append(
            ReportExample(
                key,
                expression.text,
                f"J&F {score['jf']:.1f}" if score else "no true mask",
                names,
                video.frames(ids),
                video.mask(expression.anno_ids, ids) if video.has_masks else None,
                np.stack([read_mask(masks / key / f"{name}.png") for name in names]),
            )
        )
    return examples
