"""Whole held-out videos while training: each sampled, decoded and scored as `flowmask evaluate` does.

Each rank scores some of the videos. It encodes their sentences and frames once, at the start, and lets the text encoder
go. The numbers depend on nothing but weights, videos and settings: they are those of `flowmask evaluate` of the same
checkpoint. (Of a LoRA run they are so within rounding, as its adapters are not merged here.)
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowmask.data_pipeline.plan.leaks import refuse_trained_on
from flowmask.data_pipeline.read.epoch_plan import spread
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Video, VideoSet
from flowmask.models.device import gpu_holds
from flowmask.models.errors import DataError, UserError
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.segment import Segmenter
from flowmask.models.strict import read_json
from flowmask.models.text import clean
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.predict.inference import DTYPES, EncoderPrecision, LoadedSegmenter, box_of, conventions, sides_in
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.metrics import shown_in
from flowmask.trainer.score.protocols import protocol_named
from flowmask.trainer.score.results import merge

KEY = "evaluate.whole_videos"
_LESS_MEMORY = f"make {KEY}.box smaller, or lower {KEY}.sentences_per_batch"
_POSITIONS = 1024  # of latent frames that a DiT knows whose config does not tell
Found = dict[str, float]


class KnownSentences:
    """Embeddings that were made before, on the CPU; takes the place of the text encoder that made them."""

    def __init__(self, encoder: Callable[..., Tensor], sentences: Sequence[str], *, max_tokens: int) -> None:
        """sentences: cleaned."""
        self._known = {text: encoder(text, max_tokens=max_tokens).cpu() for text in dict.fromkeys(sentences)}

    def __call__(self, text: str, *, max_tokens: int) -> Tensor:
        return self._known[text]


@dataclass(frozen=True)
class Parts:
    """What a rank that has videos to score keeps on the CPU beside the DiT."""

    vae: Any
    decoder: nn.Module
    sentences: KnownSentences


@dataclass(frozen=True)
class WholeVideos:
    """Which videos are scored how; `measure` is collective.

    config:     what `flowmask evaluate` would be told; its `out` is not used
    videos:     in the order of the dataset; place p is scored by rank p mod world size
    parts:      None on a rank without videos
    definition: what the numbers depend on beside the weights, see `best.py`
    say:        takes the line about what could not be scored
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
        """eval_whole_<name> of every number; nothing, and a line, if a video cannot be scored; None: it was stopped.

        dit: on this rank's device, with the averaged weights
        stop: asked of all ranks together, after each video
        """
        records: list[dict[str, Any]] = []
        ranks = distributed.world_size()
        with self._loaded(dit) as loaded:
            for first in range(0, len(self.videos), ranks):
                if first and stop():
                    return None
                found = distributed.gather_objects(self._attempt(loaded, first + distributed.rank()))
                if problem := next((one for one in found if isinstance(one, str)), None):
                    self.say(f"whole videos have no score this time: {problem}; the training goes on")
                    return {}
                records += found[: len(self.videos) - first]
        return self._numbers(records)

    def _attempt(self, loaded: LoadedSegmenter | None, place: int) -> dict[str, Any] | str | None:
        """The record of a video, or in one line why there is none; None for a place without a video."""
        if place >= len(self.videos):
            return None
        assert loaded is not None
        video = self.videos[place]
        try:
            with gpu_holds(f"{video} as a whole", fix=_LESS_MEMORY):
                return self._record(loaded, video)
        except (UserError, OSError) as error:
            return f"{video}: {error}"

    def _record(self, loaded: LoadedSegmenter, video: Video) -> dict[str, Any]:
        protocol = None if self.config.protocol is None else protocol_named(self.config.protocol)
        with tempfile.TemporaryDirectory() as scratch:
            folders = {e.exp_id: Path(scratch) / str(n) for n, e in enumerate(video.expressions)}
            for folder in folders.values():
                folder.mkdir()
            from flowmask.trainer.score.evaluate import _evaluate_video

            record = _evaluate_video(
                self.config, loaded, video, folders, protocol=protocol, labels=Path(scratch) / "labels"
            )
        return json.loads(json.dumps(record))

    @contextmanager
    def _loaded(self, dit: Any) -> Iterator[LoadedSegmenter | None]:
        """While inside, all that segments is on this rank's device; None on a rank without videos."""
        if self.parts is None:
            yield None
            return
        moved = (self.parts.vae, self.parts.decoder)
        for part in moved:
            part.to(distributed.device())
        try:
            segmenter = Segmenter(
                dit,
                vae=self.parts.vae,
                text_encoder=self.parts.sentences,
                mask_decoder=self.parts.decoder,
                settings=conventions(self.settings, sampler=self.config.sampler),
            )
            assert self.config.box is not None
            yield LoadedSegmenter(
                segmenter, pixel_norm=self.settings["pixel_norm"], box=self.config.box, weights={}, wan_files=""
            )
        finally:
            for part in moved:
                part.to("cpu")

    def _numbers(self, records: Sequence[Mapping[str, Any]]) -> Found:
        """Those of scores.json that validation shows, and the protocol's by its default convention."""
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
        numbers = {name: value for name, value in scores.totals.items() if name in shown} | scores.nothing
        if (known := scores.protocol) is not None:
            for title, row in known["tables"][known["convention"]].items():
                kind = "" if title == "all" else f"{title.replace(' ', '_')}_"
                numbers |= {f"{known['name']}_{kind}{name}": value for name, value in row.items()}
        return {f"eval_whole_{name}": value for name, value in numbers.items() if value is not None}


def whole_videos_of(
    config: RunConfig,
    *,
    settings: Mapping[str, Any],
    fields: Mapping[str, Any],
    caches: Sequence[CacheReader],
    vae: Any,
    decoder: tuple[MaskDecoder, str],
    say: Callable[[str], None],
) -> WholeVideos:
    """What `evaluate.whole_videos` asks for, with all that this rank needs; UserError for what can't be scored.

    settings: the conventions of the weights, as a checkpoint has them; fields: of the training cache's fingerprint
    caches:   what is trained on; none of a stream, whose videos are not known
    vae:      its encoder is that of the mask decoder; becomes of the precision that the cache was encoded in
    decoder:  the mask decoder and its hash
    """
    try:
        return _prepare(config, settings, fields, caches, vae, decoder, say)
    except UserError as error:
        raise type(error)(f"{KEY}: {error}") from error


def _prepare(
    config: RunConfig,
    settings: Mapping[str, Any],
    fields: Mapping[str, Any],
    caches: Sequence[CacheReader],
    vae: Any,
    decoder: tuple[MaskDecoder, str],
    say: Callable[[str], None],
) -> WholeVideos:
    asked = config.evaluate.whole_videos
    assert asked is not None
    evaluation = EvaluateConfig(
        out=config.out,
        checkpoint=str(config.out),
        data=asked.data,
        box=asked.box or box_of({**sides_in(fields), **settings}),
        sampler=config.evaluate.sampler,
        precision=config.train.precision,
        tf32=config.train.tf32,
        sentences_per_batch=asked.sentences_per_batch,
        protocol=asked.protocol,
    )
    source, folder = open_source(asked.data), WanFolder(config.model.wan)
    videos = chosen(source.videos(), asked.videos)
    _refuse_unscorable(videos, evaluation, wan=folder)
    if distributed.rank() == 0:
        refuse_trained_on(videos, asked.data, caches)
        if not caches:
            say(f"{KEY}: whether these videos are in the stream that is trained on is not known")
    share = videos[distributed.rank() :: distributed.world_size()]
    for video in share:
        video.check_masks()
    known = {**settings, "encoder_dtype": fields.get("cache.encoder_dtype")}
    encoders = EncoderPrecision.of(known, asked=None, otherwise=config.train.precision)
    nn.Module.to(vae, DTYPES[encoders.video])
    parts = Parts(vae, decoder[0], _sentences(share, folder, settings, encoders)) if share else None
    definition = _definition(evaluation, source, videos, decoder=decoder[1])
    return WholeVideos(evaluation, videos, settings, parts, definition, say)


def _sentences(
    share: Sequence[Video], folder: WanFolder, settings: Mapping[str, Any], encoders: EncoderPrecision
) -> KnownSentences:
    """The embeddings of all sentences, by a text encoder that is gone when they are made."""
    texts = [clean(e.text, lowercase=settings["lowercase"]) for video in share for e in video.expressions]
    fix = f"build the training cache with cache.encoder_dtype=bfloat16, or do without ({KEY}=null)"
    with gpu_holds("the text encoder at work", fix=fix):
        encoder = folder.text_encoder(DTYPES[encoders.text])
        encoder.model.to(distributed.device())
        return KnownSentences(encoder, texts, max_tokens=settings["text_tokens"])


def _definition(config: EvaluateConfig, source: VideoSet, videos: Sequence[Video], *, decoder: str) -> dict[str, Any]:
    """What shapes the scores and may change between two starts, in JSON's types; not where the dataset lies."""
    files = json.dumps([(video.video_id, video.files_digest()) for video in videos])
    return {
        **config.model_dump(mode="json", include={"box", "sampler", "protocol"}),
        "dataset": source.identity(),
        "videos": hashlib.sha256(files.encode()).hexdigest(),
        "mask_decoder": decoder,
    }


def chosen(videos: Sequence[Video], count: int) -> list[Video]:
    """`count` of the videos that have sentences, or all, in their order; those of a smaller count are among them."""
    some = [video for video in videos if video.expressions]
    return [some[place] for place in sorted(spread(count, len(some)).tolist())]


def _refuse_unscorable(videos: Sequence[Video], config: EvaluateConfig, *, wan: WanFolder) -> None:
    """DataError for a video without true masks, of another kind than the protocol's, or with too many frames."""
    protocol = None if config.protocol is None else protocol_named(config.protocol)
    positions = read_json(wan.path / "transformer" / "config.json").get("rope_max_seq_len", _POSITIONS)
    longest = 4 * positions - 3
    for video in videos:
        if not video.has_masks:
            raise DataError(
                f"{video} of {config.data.root} ({config.data.split}) has no true masks; name another split"
            )
        if protocol is not None and config.protocol is not None:
            protocol.refuse_video(video, name=config.protocol)
        if len(video.frame_names) > longest:
            raise DataError(f"{video} has {len(video.frame_names)} frames; the DiT takes at most {longest}")
