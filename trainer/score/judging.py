"""The masks of one video against the true ones: every metric of each sentence, and of what it is compared with.

Knows the masks by the files that an evaluation has written; the truth by the dataset. Models only for the decoder's
ceiling.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowmask.data_pipeline.clip.pixels import resize_masks
from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.trainer.predict.inference import FRAMES_AT_ONCE, LoadedSegmenter, MaskPiece, VaeClip, chunks, masks_of
from flowmask.trainer.predict.overlay import read_mask
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.metrics import Tally
from flowmask.trainer.score.protocols.base import Answer, JudgedPiece
from flowmask.trainer.score.slices import TRUTH, TrueSize


def score_masks(
    config: EvaluateConfig, video: Video, folders: Mapping[str, Path], scored: dict[str, dict[str, Any]]
) -> list[Answer]:
    """Add "right", and "wrong" where that is asked for, to each record; returns the answers, for a protocol."""
    wrong = shuffled_partners(video, seed=config.seed) if config.shuffled_text else {}
    answers = []
    for expression in video.expressions:
        entry, own = scored[expression.exp_id], folders[expression.exp_id]
        tally = _score(video, expression, _stored(video, own), also=(true_size := TrueSize()))
        _note(entry, "right", tally)
        entry[TRUTH] = true_size.facts()
        j, f = tally.j_and_f()
        answers.append(Answer(expression, entry["answered"], j, f, _reader(video, expression, own)))
        if expression.exp_id in wrong:
            partner = folders[wrong[expression.exp_id]]
            _note(entry, "wrong", _score(video, expression, _stored(video, partner)))
    return answers


def shuffled_partners(video: Video, *, seed: int) -> dict[str, str]:
    """For each expression id, the id of one of the same video that names none of its objects, in other words.

    Of two that name nothing none is wrong for the other. Expressions without such a partner are left out. The choice
    is a function of the seed and the ids. Nothing has to be sampled again: what the partner's sentence selects is the
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


def _stored(video: Video, folder: Path) -> Iterator[MaskPiece]:
    """The masks of one expression as they were written."""
    for ids in chunks(range(len(video.frame_names)), FRAMES_AT_ONCE):
        yield ids, np.stack([read_mask(folder / f"{video.frame_names[i]}.png") for i in ids])


def _reader(video: Video, expression: Expression, folder: Path) -> Callable[[], Iterator[JudgedPiece]]:
    """Reads the masks of one expression, with their truth, each time that it is called."""
    return lambda: _judged(video, expression, _stored(video, folder))


def _score(
    video: Video, expression: Expression, predicted: Iterable[MaskPiece], *, also: TrueSize | None = None
) -> Tally:
    """Every metric over the annotated frames of a video; `also` takes up the true masks."""
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


def _note(scored: dict[str, Any], kind: str, tally: Tally) -> None:
    """Put scores into an expression's record; the sums only where a metric has some, which is of a package's."""
    scored[kind] = tally.scores()
    if sums := tally.sums():
        scored.setdefault("sums", {})[kind] = sums


def score_decoder(loaded: LoadedSegmenter, video: Video, clip: VaeClip, scored: dict[str, dict[str, Any]]) -> None:
    """Add "decoder" to each record: the true mask through the VAE and the mask decoder, once a mask."""
    known: dict[tuple[str, ...], Tally] = {}
    for expression in video.expressions:
        if expression.anno_ids not in known:
            small = [
                resize_masks(video.mask(expression.anno_ids, ids), size=clip.size)
                for ids in chunks(range(clip.frames), FRAMES_AT_ONCE)
            ]
            logits = loaded.round_trip(np.concatenate(small))
            known[expression.anno_ids] = _score(video, expression, masks_of(logits, clip))
        _note(scored[expression.exp_id], "decoder", known[expression.anno_ids])
