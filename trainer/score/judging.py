"""The masks of one video against the true ones: every metric of each sentence, and of its comparisons.

Gets the masks when they are made, or later from their files; the truth from the dataset. Loads no model.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from flowmask.data_pipeline.clip.pixels import resize_masks
from flowmask.data_pipeline.clip.vae_clip import FRAMES_AT_ONCE, VaeClip, chunks
from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.trainer.predict.inference import MaskPiece
from flowmask.trainer.predict.windows.clips import Blend, final_masks
from flowmask.trainer.predict.windows.cut import TimeWindow
from flowmask.trainer.score.mask_places import MaskPlace
from flowmask.trainer.score.metrics import Tally
from flowmask.trainer.score.metrics.base import Mask
from flowmask.trainer.score.protocols.base import Answer, JudgedPiece
from flowmask.trainer.score.slices import TRUTH, TrueSize


class Judge:
    """The scores of one video's sentences: each is scored when its masks are made; all are compared at the end."""

    def __init__(self, video: Video, places: Mapping[str, MaskPlace]) -> None:
        """places: the storage of the masks of each expression id."""
        self.answers: dict[str, Answer] = {}  # by expression id, for a protocol
        self._video, self._places = video, places

    def right(self, expression: Expression, entry: dict[str, Any], predicted: Iterable[MaskPiece]) -> None:
        """Add "right" to the record of an expression; `entry["answered"]` is known once `predicted` is exhausted."""
        tally = _score(self._video, expression, predicted, also=(true_size := TrueSize()))
        note(entry, "right", tally)
        entry[TRUTH] = true_size.facts()
        j, f = tally.j_and_f()
        reader = _reader(self._video, expression, self._places[expression.exp_id])
        self.answers[expression.exp_id] = Answer(expression, entry["answered"], j, f, reader)

    def wrong(self, entries: Mapping[str, dict[str, Any]], *, seed: int) -> None:
        """Add "wrong" to the records of expressions with a partner: the partner's masks against their truth."""
        partners = shuffled_partners(self._video, seed=seed)
        for expression in self._video.expressions:
            if expression.exp_id in partners:
                written = stored(self._video, self._places[partners[expression.exp_id]])
                note(entries[expression.exp_id], "wrong", _score(self._video, expression, written))


def shuffled_partners(video: Video, *, seed: int) -> dict[str, str]:
    """For each expression id, another expression of the same video that names none of its objects.

    Two sentences that both name nothing are no partners. Expressions without a partner are left out. The choice
    is a function of the seed and the ids. Nothing is sampled again: the mask of the partner's sentence is the
    partner's prediction.
    """
    partners = {}
    for expression in video.expressions:
        others = [
            other.exp_id
            for other in video.expressions
            if not set(other.anno_ids) & set(expression.anno_ids) and other.text != expression.text
            if other.anno_ids or expression.anno_ids
        ]
        if others:
            key = hashlib.sha256(f"{video.video_id}/{expression.exp_id}".encode()).digest()[:8]
            partners[expression.exp_id] = others[mix64(seed, int.from_bytes(key)) % len(others)]
    return partners


def stored(video: Video, place: MaskPlace) -> Iterator[MaskPiece]:
    """The written masks of one expression."""
    for ids in chunks(range(len(video.frame_names)), FRAMES_AT_ONCE):
        yield ids, np.stack([place.read(video.frame_names[i]) for i in ids])


def _reader(video: Video, expression: Expression, place: MaskPlace) -> Callable[[], Iterator[JudgedPiece]]:
    """Reads the masks of one expression, with their truth, each time that it is called."""
    return lambda: _judged(video, expression, stored(video, place))


def _score(
    video: Video, expression: Expression, predicted: Iterable[MaskPiece], *, also: TrueSize | None = None
) -> Tally:
    """Every metric over the annotated frames of a video; `also` receives the true masks."""
    tally = Tally()
    for _, truth, masks in _judged(video, expression, predicted):
        tally.add(truth, masks)
        if also is not None:
            also.add(truth)
    return tally


def _judged(video: Video, expression: Expression, predicted: Iterable[MaskPiece]) -> Iterator[JudgedPiece]:
    """The annotated frames of a video with their truth."""
    known = video.annotated(expression.anno_ids)
    for ids, masks in predicted:
        places = [place for place, i in enumerate(ids) if known is None or i in known]
        if places:
            judged = [ids[place] for place in places]
            yield judged, video.mask(expression.anno_ids, judged), masks[places]


def note(scored: dict[str, Any], kind: str, tally: Tally) -> None:
    """Put scores into an expression's record; sums only for metrics that have some (those of packages)."""
    scored[kind] = tally.scores()
    if sums := tally.sums():
        scored.setdefault("sums", {})[kind] = sums


def decoder_tallies(
    round_trip: Callable[[Mask], Tensor], video: Video, windows: Sequence[TimeWindow], clip: VaeClip
) -> dict[str, Tally]:
    """By expression id, the scores of the true mask after the VAE and the mask decoder; each mask is decoded once.

    round_trip: masks bool [F H W] of the clip's size to logits [4k+1 H W]; clip: of any window
    """

    def decoded(anno_ids: Sequence[str]) -> Iterator[MaskPiece]:
        blend = Blend()
        for window in windows:
            small = [
                resize_masks(video.mask(anno_ids, ids), size=clip.size) for ids in chunks(window.frames, FRAMES_AT_ONCE)
            ]
            yield from final_masks(window, blend.add(window, round_trip(np.concatenate(small))), clip)

    known: dict[tuple[str, ...], Tally] = {}
    for expression in video.expressions:
        if expression.anno_ids not in known:
            known[expression.anno_ids] = _score(video, expression, decoded(expression.anno_ids))
    return {expression.exp_id: known[expression.anno_ids] for expression in video.expressions}
