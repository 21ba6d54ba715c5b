"""Measures J&F of a few videos for each combination of the unknown conventions, to find those of the training.

Weights are loaded once. A video is read and encoded once for each pixel_norm. The DiT runs once for each distinct
input, because mask_latent_norm changes only the use of its output. Writes nothing.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmask.data_pipeline.clip.vae_clip import VaeClip
from flowmask.data_pipeline.sources.base import Video
from flowmask.models.errors import ConfigError, DataError
from flowmask.models.segment import Segmenter, SegmentSettings, sample_mask
from flowmask.models.text import clean
from flowmask.models.vae import denormalise
from flowmask.trainer.predict.conventions import segment_settings, settle
from flowmask.trainer.predict.inference import LoadedSegmenter
from flowmask.trainer.predict.weights import stored_settings
from flowmask.trainer.predict.windows.cut import TimeWindow
from flowmask.trainer.score.evaluate import loaded_by, opened
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.mask_places import MaskMemory
from flowmask.trainer.score.metrics import MAIN, totals
from flowmask.trainer.score.one_video import OneVideo, Record, VideoSettings

VIDEOS = 4
TRIED: dict[str, tuple[Any, ...]] = {
    "pixel_norm": ("half", "imagenet"),
    "text_tokens": (256, 64),
    "mask_latent_norm": ("none", "video"),
    "lowercase": (True, False),
}
Values = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """One combination and the mean of every metric over the expressions, in percent."""

    conventions: Values
    scores: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Flat: conventions, then metrics."""
        return {**self.conventions, **self.scores}


def try_settings(
    config: EvaluateConfig,
    *,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Tried]:
    """Every combination, best J&F first, on the first `max_videos` videos (default: `VIDEOS`); no mask is emptied.

    Conventions recorded in the weights or set in `config.conventions` are fixed. Raises ConfigError if all of them are,
    DataError without true masks.
    """
    if not settle(stored_settings(config.checkpoint), config.conventions, where=config.checkpoint).assumed:
        raise ConfigError(f"{config.checkpoint}: all of its conventions are known, so there is nothing to try")
    config = config.model_copy(update={"max_videos": config.max_videos or VIDEOS, "protocol": None})
    _, videos, _ = opened(config)
    for video in videos:
        video.check_masks()
        if not video.has_masks:
            raise DataError(f"{video.video_id} has no true masks; give a split that has them (data.split)")
    loaded = loaded_by(config, say)
    records: dict[int, list[Record]] = {}
    combinations = list(_combinations(loaded))
    done, total = 0, len(videos) * len(combinations)
    say(f"{len(combinations)} combinations, each on {len(videos)} video{'s' * (len(videos) != 1)}")
    on_progress("scores", done, total)
    for video in videos:
        for number, record in _records(config, loaded, video, combinations):
            records.setdefault(number, []).append(record)
            done += 1
            on_progress("scores", done, total)
    tried = [Tried(known, _means(records[number])) for number, known in enumerate(combinations)]
    return sorted(tried, key=lambda one: -one.scores[MAIN])


def _combinations(loaded: LoadedSegmenter) -> Iterator[Values]:
    """All four conventions: each value of the assumed ones, the known value of the others."""
    known = loaded.conventions
    for values in product(*(TRIED[name] if name in loaded.assumed else (known[name],) for name in TRIED)):
        yield dict(zip(TRIED, values))


def _records(
    config: EvaluateConfig, loaded: LoadedSegmenter, video: Video, combinations: Sequence[Values]
) -> Iterator[tuple[int, Record]]:
    """The record of a video under each combination, by its number. Combinations with equal results share one."""
    for pixel_norm in dict.fromkeys(known["pixel_norm"] for known in combinations):
        base = replace(loaded, pixel_norm=pixel_norm)
        found: dict[tuple[Any, ...], Record] = {}
        windows: list[tuple[TimeWindow, VaeClip, Tensor, dict[str, Tensor]]] = [
            (window, clip.without_pixels(), base.encode(clip), {}) for window, clip in _scored(config, video).read(base)
        ]
        for number, known in enumerate(combinations):
            if known["pixel_norm"] != pixel_norm:
                continue
            texts = tuple(clean(one.text, lowercase=known["lowercase"]) for one in video.expressions)
            key = (known["text_tokens"], known["mask_latent_norm"], texts)
            if key not in found:
                settings = segment_settings(known, sampler=config.sampler)
                one = _scored(config, video)
                for window, clip, video_latent, samples in windows:
                    here = replace(base, segmenter=_Sharing(loaded.segmenter, settings, samples))
                    for expression, logits in one.sentences(here, video_latent):
                        one.answer(expression, logits, clip, window=window)
                found[key] = one.record()
            yield number, found[key]


def _scored(config: EvaluateConfig, video: Video) -> OneVideo:
    places = {expression.exp_id: MaskMemory() for expression in video.expressions}
    return OneVideo(VideoSettings(box=config.box, window=config.window), video, places, labels=Path())


class _Sharing(Segmenter):
    """A segmenter with other settings, which shares the DiT's outputs for one clip with its siblings.

    samples: known mask latents of the DiT, by the hash of the texts' embeddings
    """

    def __init__(self, of: Segmenter, settings: SegmentSettings, samples: dict[str, Tensor]) -> None:
        super().__init__(
            of.dit, vae=of.vae, text_encoder=of.text_encoder, mask_decoder=of.mask_decoder, settings=settings
        )
        self._samples = samples

    @torch.no_grad()
    def mask_latent(self, video_latent: Tensor, text: Tensor) -> Tensor:
        """As Segmenter."""
        key = hashlib.sha256(text.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        if key not in self._samples:
            where, raw = self.dit.device, replace(self.settings, mask_latent_norm="none")
            self._samples[key] = sample_mask(
                self.dit, video_latent=video_latent.to(where), text=text.to(where), settings=raw, stats=self.stats
            )
        sample = self._samples[key]
        return denormalise(self.stats, sample) if self.settings.mask_latent_norm == "video" else sample


def _means(records: Sequence[Record]) -> dict[str, float]:
    """Every metric over the expressions of all videos."""
    entries = [entry for record in records for entry in record["expressions"].values()]
    found = totals([entry["right"] for entry in entries], [entry.get("sums", {}).get("right", {}) for entry in entries])
    return dict(found)
