"""Chooses the expressions for a report, and reads the frames and masks of one."""

from collections.abc import Collection, Mapping
from pathlib import Path
from random import Random

import numpy as np

from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.show.page import spread
from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.trainer.predict.show.overlay import read_mask
from flowmask.trainer.score.metrics import MAIN, metrics
from flowmask.trainer.score.report.page import ReportExample

_SHEET_FRAMES = 6


def choose(keys: Collection[str], ranks: Mapping[str, float], count: int, *, seed: int) -> dict[str, list[str]]:
    """At most `count` different keys, grouped by choice: a third lowest, a third highest, the rest random.

    ranks: key -> the main metric; keys without one can only be drawn at random. Equal ranks are in the order of the
    keys.
    """
    title = metrics()[MAIN].title
    ranked = sorted(ranks, key=lambda key: (ranks[key], key))
    third = -(-min(count, len(ranked)) // 3)
    lowest, highest = ranked[:third], ranked[::-1][: min(third, len(ranked) - third, count - third)]
    rest = sorted(set(keys) - {*lowest, *highest})
    drawn = Random(mix64(seed)).sample(rest, min(count - len(lowest) - len(highest), len(rest)))
    found = {
        f"Worst: the lowest {title} of {len(ranked):,}": lowest,
        f"Best: the highest {title} of {len(ranked):,}": highest,
        f"Random: drawn by seed {seed} from {'the others' if ranked else 'all'}": sorted(drawn),
    }
    return {how: some for how, some in found.items() if some}


def example(
    key: str, video: Video, expression: Expression, *, masks: Path, scores: Mapping[str, Mapping[str, float]]
) -> ReportExample:
    """A few frames of an expression, evenly spread over the annotated ones, with its masks."""
    known = sorted(video.annotated(expression.anno_ids) or range(len(video.frame_names)))
    ids = [known[place] for place in spread(len(known), _SHEET_FRAMES)]
    names = [video.frame_names[i] for i in ids]
    main, score = metrics()[MAIN], scores.get(key)
    return ReportExample(
        key,
        expression.text,
        f"{main.title} {main.say(score[MAIN])}" if score else "no true mask",
        names,
        video.frames(ids),
        video.mask(expression.anno_ids, ids) if video.has_masks else None,
        np.stack([read_mask(masks / key / f"{name}.png") for name in names]),
    )
