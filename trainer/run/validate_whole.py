"""Whole held-out videos during training: sampled, decoded and scored one by one, as `flowmask evaluate` does.

Each rank scores some of the videos. It encodes their sentences and frames once, at the start, and then frees the text
encoder. The numbers depend only on weights, videos and settings: they equal those of `flowmask evaluate` for the same
checkpoint. (For a LoRA run they are equal within rounding, because its adapters are not merged here.)
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from flowmask.data_pipeline.clip.vae_clip import VaeClip
from flowmask.data_pipeline.sources.base import Video
from flowmask.models.device import gpu_holds
from flowmask.models.errors import UserError
from flowmask.models.segment import Segmenter
from flowmask.trainer import distributed
from flowmask.trainer.predict.conventions import segment_settings
from flowmask.trainer.predict.inference import LoadedSegmenter
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.mask_places import MaskMemory
from flowmask.trainer.score.metrics import shown_in
from flowmask.trainer.score.one_video import OneVideo, Record, VideoSettings
from flowmask.trainer.score.protocols import numbers_by_name, protocol_named
from flowmask.trainer.score.results import merge

KEY = "evaluate.whole_videos"
LESS_MEMORY = f"make {KEY}.box smaller"
Found = dict[str, float]


class KnownSentences:
    """Embeddings on the CPU, computed at the start; used in place of the text encoder."""

    def __init__(self, encoder: Callable[..., Tensor], sentences: Sequence[str], *, max_tokens: int) -> None:
        """encoder: returns [L D] for a sentence    sentences: cleaned text"""
        self._known = {text: encoder(text, max_tokens=max_tokens).cpu() for text in dict.fromkeys(sentences)}

    def __call__(self, text: str, *, max_tokens: int) -> Tensor:
        """Embedding [L D] of one of the sentences."""
        return self._known[text]


@dataclass(frozen=True)
class Parts:
    """The data on the CPU of a rank that scores videos, in addition to the DiT.

    clips: by index of the video: its sizes, without pixels, and its latent [1 16 f h w] norm
    """

    vae: Any
    decoder: nn.Module
    sentences: KnownSentences
    clips: Mapping[int, tuple[VaeClip, Tensor]]


@dataclass(frozen=True)
class WholeVideos:
    """The videos to score, and the settings; `measure` is collective.

    config:     as for `flowmask evaluate`; its `out` is not used
    videos:     in the order of the dataset; rank p mod world size scores video p
    parts:      None on a rank without videos
    definition: settings that the numbers depend on, apart from the weights, see `best.py`
    say:        receives the message about a video that could not be scored
    """

    config: EvaluateConfig
    videos: Sequence[Video]
    settings: Mapping[str, Any]
    parts: Parts | None
    definition: dict[str, Any]
    say: Callable[[str], None]

    def __str__(self) -> str:
        data = self.config.data
        return f"{len(self.videos)} whole videos of {data.root} ({data.split})"

    def measure(self, dit: nn.Module, *, stop: Callable[[], bool]) -> Found | None:
        """eval_whole_<name> for every number; empty, with a message, if a video cannot be scored; None if stopped.

        dit: on this rank's device, with the averaged weights
        stop: called by all ranks together before each round of videos
        """
        records: list[Record] = []
        ranks = distributed.world_size()
        with self._loaded(dit) as loaded:
            for first in range(0, len(self.videos), ranks):
                if stop():
                    return None
                found = distributed.gather_objects(self._attempt(loaded, first + distributed.rank()))
                if problem := next((one for one in found if isinstance(one, str)), None):
                    self.say(f"whole videos have no score this time: {problem}; the training continues")
                    return {}
                records += found[: len(self.videos) - first]
        return self._numbers(records)

    def _attempt(self, loaded: LoadedSegmenter | None, place: int) -> Record | str | None:
        """The record of a video, or one line with the reason if there is none; None for an index without a video."""
        if place >= len(self.videos):
            return None
        assert loaded is not None
        video = self.videos[place]
        try:
            with gpu_holds(f"{video} as a whole", fix=LESS_MEMORY):
                return self._record(loaded, place)
        except (UserError, OSError) as error:
            return f"{video}: {error}"

    def _record(self, loaded: LoadedSegmenter, place: int) -> Record:
        """The record that an evaluation writes for a video, after writing and reading it."""
        assert self.parts is not None
        video, (clip, video_latent) = self.videos[place], self.parts.clips[place]
        protocol = None if self.config.protocol is None else protocol_named(self.config.protocol)
        places = {expression.exp_id: MaskMemory() for expression in video.expressions}
        with TemporaryDirectory() as scratch:  # some protocols write label maps
            one = OneVideo(VideoSettings(), video, places, protocol=protocol, labels=Path(scratch) / "labels")
            for expression, logits in one.sentences(loaded, video_latent):
                one.answer(expression, logits, clip)
            found: Record = json.loads(json.dumps(one.record()))
        return found

    @contextmanager
    def _loaded(self, dit: Any) -> Iterator[LoadedSegmenter | None]:
        """Inside the block, the segmenter is on this rank's device; None on a rank without videos."""
        if self.parts is None:
            yield None
            return
        assert self.config.box is not None
        segmenter = Segmenter(
            dit,
            vae=self.parts.vae,
            text_encoder=self.parts.sentences,
            mask_decoder=self.parts.decoder.to(distributed.device()),
            settings=segment_settings(self.settings, sampler=self.config.sampler),
        )
        pixel_norm = self.settings["pixel_norm"]
        try:
            yield LoadedSegmenter(segmenter, pixel_norm=pixel_norm, box=self.config.box, weights={}, wan_files="")
        finally:
            self.parts.decoder.to("cpu")

    def _numbers(self, records: Sequence[Mapping[str, Any]]) -> Found:
        """The numbers of scores.json that validation shows; the protocol's own under its default convention."""
        scores = merge(
            self.videos,
            records,
            protocol=self.config.protocol,
            checkpoint=self.config.checkpoint,
            weights={},
            fingerprint="",
            seed=self.config.seed,
        )
        shown = shown_in("validation")
        numbers = {name: value for name, value in scores.totals.items() if name in shown}
        numbers |= scores.nothing | numbers_by_name(scores.protocol)
        return {f"eval_whole_{name}": value for name, value in numbers.items() if value is not None}
