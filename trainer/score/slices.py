"""Scores of parts of a dataset: by length, size and number of objects, motion words, absence, and kind of object.

A new slice is an entry of `_SLICES`: it maps the facts of an expression to the name of its bucket, or to None. Facts
that need the true masks are measured while a video is scored (`TrueSize`), and stored in its record.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowmask.data_pipeline.sources.base import Expression, Video, names_nothing
from flowmask.trainer.score.metrics import totals
from flowmask.trainer.score.metrics.base import Mask

TRUTH = "truth"  # of an expression's entry in a record
Slices = dict[str, dict[str, dict[str, float]]]
TITLES = {
    "video_frames": "Length of the video, frames",
    "object_share": "Size of the object where it is seen, share of the frame",
    "objects": "Objects that the sentence names",
    "motion_words": "Words for motion",
    "absent_frames": "Annotated frames without the object",
    "kind": "Kind of sentence",
    "target": "What the sentence names",
}
_VERBS = (
    "approach bend bounce carry chase climb come crawl dance dash descend dive drift drive drop eat enter exit "
    "fall feed fight flip float follow gallop glide go grab hit hold hop jog jump kick leap leave lick lift "
    "lower march mount move nod overtake paddle pass pick pounce pull push raise reach retreat return ride rise "
    "roll rotate run rush scoot scratch shake skate spin sprint stop stretch stroll struggle sway swerve swim "
    "swing throw tilt touch travel trot tumble turn twist walk wander wiggle wrestle zoom"
)
_NOUNS_TOO = (
    "back circle cross flap fly land lead look open play row ski slide slow step switch wave"  # motion with -ing, -ed
)
_OTHERS = (
    "ascending backward backwards ate came carries carried fell flew flies fought held hid left-to-right led onward "
    "rode rose ran sped speeding shook slid swam threw toward towards upward upwards downward downwards went motion "
    "movement forward forwards"
)
_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")


@dataclass(frozen=True)
class Sliced:
    """The facts of one expression; `truth`: see `TrueSize.facts`."""

    frames: int
    text: str
    kind: str
    objects: int
    target: bool
    truth: Mapping[str, Any]


class TrueSize:
    """The size of an expression's true mask, measured a few frames at a time."""

    def __init__(self) -> None:
        self._shares: list[float] = []

    def add(self, truth: Mask) -> None:
        """Add frames of the true mask bool [F H W]."""
        self._shares += np.mean(truth, axis=(1, 2)).tolist()

    def facts(self) -> dict[str, Any]:
        """frames: annotated ones; absent: those without a true pixel; share: of the frame, mean of the others."""
        seen = [share for share in self._shares if share]
        share = float(np.mean(seen)) if seen else None
        return {"frames": len(self._shares), "absent": len(self._shares) - len(seen), "share": share}


def slices(videos: Sequence[Video], records: Sequence[Mapping[str, Any]]) -> Slices | None:
    """Every metric of each bucket of each slice, and its number of expressions; None if nothing has a score.

    A slice without buckets is left out.
    """
    known = [
        (_sliced(video, expression, record), record["expressions"][expression.exp_id])
        for video, record in zip(videos, records, strict=True)
        for expression in video.expressions
        if "right" in record["expressions"][expression.exp_id]
    ]
    if not known:
        return None
    found = {name: _slice(bucket, known) for name, bucket in _SLICES.items()}
    return {name: table for name, table in found.items() if table}


def has_motion(text: str) -> bool:
    """Whether a sentence has an English word for motion, in any of its forms."""
    return not _MOTION.isdisjoint(_WORD.findall(text.lower()))


def _sliced(video: Video, expression: Expression, record: Mapping[str, Any]) -> Sliced:
    return Sliced(
        frames=record["frames"],
        text=expression.text,
        kind=expression.kind,
        objects=len(expression.anno_ids),
        target=not names_nothing(video, expression),
        truth=record["expressions"][expression.exp_id][TRUTH],
    )


def _slice(bucket: "Bucket", known: Iterable[tuple[Sliced, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """By bucket, in order: every metric of its expressions, and their number."""
    members: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for facts, entry in known:
        if (place := bucket(facts)) is not None:
            members.setdefault(place, []).append(entry)
    return {name: _scores(members[place, name]) for place, name in sorted(members)}


def _scores(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = totals([entry["right"] for entry in entries], [entry.get("sums", {}).get("right", {}) for entry in entries])
    return {**found, "expressions": len(entries)}


def _forms(verb: str, endings: Sequence[str]) -> list[str]:
    """A verb with each of the endings; some results are no words, which does no harm."""
    stems = (verb.removesuffix("e"), verb, verb + verb[-1])  # mov-ing, walk-ing, run-n-ing
    return [f"{stem}{end}" for stem in stems for end in endings]


_MOTION = frozenset(
    [
        *(form for verb in _VERBS.split() for form in (verb, *_forms(verb, ("s", "es", "ing", "ed")))),
        *(form for verb in _NOUNS_TOO.split() for form in _forms(verb, ("ing", "ed"))),
        *_OTHERS.split(),
    ]
)
Bucket = Callable[[Sliced], tuple[int, str] | None]  # place in the table, and name


def _between(edges: Sequence[float], names: Sequence[str], value: float) -> tuple[int, str]:
    """The bucket of a value; `edges` are the lowest values of all but the first."""
    place = bisect_right(edges, value)
    return place, names[place]


def _object_share(known: Sliced) -> tuple[int, str] | None:
    share = known.truth["share"]
    names = ("below 1 %", "1 to 3 %", "3 to 10 %", "10 to 30 %", "30 % or more")
    return None if share is None else _between((0.01, 0.03, 0.1, 0.3), names, share)


def _absent_frames(known: Sliced) -> tuple[int, str] | None:
    absent, frames = known.truth["absent"], known.truth["frames"]
    if not known.target or not frames:
        return None
    names = ("none", "less than half", "half or more", "all")
    return _between((1e-9, 0.5, 1), names, absent / frames)


_SLICES: dict[str, Bucket] = {
    "video_frames": lambda known: _between(
        (25, 49, 97, 193), ("1 to 24", "25 to 48", "49 to 96", "97 to 192", "193 or more"), known.frames
    ),
    "object_share": _object_share,
    "objects": lambda known: (
        _between((2, 3, 4), ("1", "2", "3", "4 or more"), known.objects) if known.objects else None
    ),
    "motion_words": lambda known: (0, "with") if has_motion(known.text) else (1, "without"),
    "absent_frames": _absent_frames,
    "kind": lambda known: (0, known.kind) if known.kind else None,
    "target": lambda known: (0, "something") if known.target else (1, "nothing"),
}
