"""Clip planning: the frames, crop, flip, sentences and masks of a clip.

Pure: a clip is a function of (video, config, anchor, view); every draw comes from mix64 of these. All frames and
masks of a clip share the draw. Refuses a video without masks.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.clip.frames import anchor_frames, sparse_frames
from flowmask.data_pipeline.clip.pixels import resize_frame, resize_masks, train_size
from flowmask.data_pipeline.config import CacheConfig, ClipConfig
from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.sources.base import Expression, Frame, Video, names_nothing
from flowmask.models.errors import DataError
from flowmask.models.text import clean

_SIDES = re.compile(r"\b(left|right)(?=(?:most|wards?)?\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Geometry:
    """From the original frame to the VAE's input; sizes are (width, height) in px, applied top to bottom."""

    source: tuple[int, int]
    resize: tuple[int, int] | None  # before the crop
    crop: tuple[int, int, int, int] | None  # left, top, width, height
    size: tuple[int, int]
    flip: bool

    def frame(self, frame: Frame) -> Frame:
        """rgb8 [H0 W0 3] -> [H W 3]; every resize is PIL's bilinear on uint8."""
        if self.crop and self.resize:
            left, top, width, height = self.crop
            frame = resize_frame(frame, size=self.resize)[top : top + height, left : left + width]
        frame = resize_frame(np.ascontiguousarray(frame), size=self.size)
        return frame[:, ::-1] if self.flip else frame

    def masks(self, masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool [F H0 W0] -> [F H W]; every resize takes the nearest pixel."""
        if self.crop and self.resize:
            left, top, width, height = self.crop
            masks = resize_masks(masks, size=self.resize)[:, top : top + height, left : left + width]
        masks = resize_masks(masks, size=self.size)
        return masks[:, :, ::-1] if self.flip else masks


@dataclass(frozen=True)
class Sentence:
    """One expression of a clip: cleaned text as the encoder gets it, and its mask's index."""

    exp_id: str
    text: str
    mask: int


@dataclass(frozen=True)
class Clip:
    """One clip in one view; `number` counts the clips of a view, `video` is an index into the source."""

    number: int
    view: int
    video: int
    video_id: str
    frame_ids: tuple[int, ...]
    geometry: Geometry
    masks: tuple[tuple[str, ...], ...]  # distinct sets of annotation ids
    sentences: tuple[Sentence, ...]
    source: str = ""  # name of the video's dataset, if a cache has several

    @property
    def key(self) -> str:
        return f"{self.number:08d}_{self.view:02d}"

    @property
    def label(self) -> str:
        """The label of its video."""
        return f"{self.source}/{self.video_id}" if self.source else self.video_id

    def __str__(self) -> str:
        return f"clip {self.key} (video {self.label}, frames {self.frame_ids[0]}..{self.frame_ids[-1]})"


def clips_of(
    video: Video, *, index: int, first_number: int, view: int, clip: ClipConfig, cache: CacheConfig
) -> Iterator[Clip]:
    """The clips of one video in one view, numbered from `first_number`; none if it has no expression.

    If only some frames of a video are annotated, a sparse clip is one of these frames.
    """
    if not video.expressions:
        return
    if not video.has_masks:
        raise DataError(f"{video} has no masks, which a cache needs: choose a split that has them")
    wanted = [e for e in video.expressions if cache.no_target == "keep" or not names_nothing(video, e)]
    if not wanted:
        return
    length, identity = len(video.frame_names), _hash(video.label)
    known = [video.annotated(expression.anno_ids) for expression in wanted]
    anchors: Sequence[int] = range(1)
    if clip.sampling == "sparse":
        anchors = anchor_frames(length, clip.frames)
        if any(frames is not None for frames in known):  # single images: a clip would contain unannotated frames
            anchors = sorted({i for frames in known for i in (range(length) if frames is None else frames)})
            clip = clip.model_copy(update={"frames": 1})
    for place, anchor in enumerate(anchors):
        rng = Random(mix64(cache.seed, identity, anchor, view))
        frame_ids = _frame_ids(rng, anchor=anchor, length=length, config=clip)
        geometry = _geometry(rng, size=video.size, config=clip)
        here = [
            e for e, frames in zip(wanted, known, strict=True) if frames is None or any(i in frames for i in frame_ids)
        ]
        masks, sentences = _sentences(here, flip=geometry.flip, lowercase=cache.lowercase)
        yield Clip(
            number=first_number + place,
            view=view,
            video=index,
            video_id=video.video_id,
            frame_ids=frame_ids,
            geometry=geometry,
            masks=masks,
            sentences=sentences,
            source=video.source,
        )


def swap_sides(text: str) -> str:
    """The sentence of a mirrored picture: the words left and right are exchanged ("bright" stays)."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = "right" if word.lower() == "left" else "left"
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDES.sub(other, text)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _frame_ids(rng: Random, *, anchor: int, length: int, config: ClipConfig) -> tuple[int, ...]:
    if config.sampling == "sparse":
        return tuple(sparse_frames(rng, anchor=anchor, length=length, frames=config.frames))
    return (*range(length), *[length - 1] * (-(length - 1) % 4))  # the VAE takes 4k+1 frames


def _geometry(rng: Random, *, size: tuple[int, int], config: ClipConfig) -> Geometry:
    """Before a crop, the reference resizes to a larger size, without a limit on the long side."""
    height, width = size
    source, resize, crop = (width, height), None, None
    if config.augment and rng.random() < config.crop_probability:
        short_side = rng.choice(config.crop_short_sides)
        resize = train_size(width, height, short_side=short_side, long_side=None, multiple=config.size_multiple)
        width, height = (rng.randint(min(config.crop_min, side), min(side, config.crop_max)) for side in resize)
        crop = (rng.randint(0, resize[0] - width), rng.randint(0, resize[1] - height), width, height)
    target = train_size(
        width, height, short_side=config.short_side, long_side=config.long_side, multiple=config.size_multiple
    )
    flip = config.augment and rng.random() < config.flip_probability
    return Geometry(source=source, resize=resize, crop=crop, size=target, flip=flip)


def _sentences(
    expressions: Sequence[Expression], *, flip: bool, lowercase: bool
) -> tuple[tuple[tuple[str, ...], ...], tuple[Sentence, ...]]:
    masks: dict[tuple[str, ...], int] = {}
    sentences = []
    for expression in expressions:
        anno_ids = tuple(sorted(set(expression.anno_ids)))
        text = clean(swap_sides(expression.text) if flip else expression.text, lowercase=lowercase)
        sentences.append(Sentence(expression.exp_id, text, masks.setdefault(anno_ids, len(masks))))
    return tuple(masks), tuple(sentences)


def clip_facts(clip: Clip) -> dict[str, Any]:
    """Fields of a record's JSON, without its masks and expressions."""
    geometry = clip.geometry
    return {
        "clip": clip.number,
        "view": clip.view,
        **({"source": clip.source} if clip.source else {}),
        "video_id": clip.video_id,
        "frame_ids": clip.frame_ids,
        "source_size": geometry.source,
        "resize": geometry.resize,
        "crop": geometry.crop,
        "size": geometry.size,
        "flip": geometry.flip,
    }
