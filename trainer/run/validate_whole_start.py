"""Whole videos during training, before the first step: chooses them, checks them, and prepares their data.

Refuses videos of the training data, videos without true masks, and videos longer than the DiT's positions. Each rank
reads its videos once, so an unreadable frame is found at the start and not hours later.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flowmask.data_pipeline.clip.pixels import PixelNorm
from flowmask.data_pipeline.clip.vae_clip import VaeClip, read_clip
from flowmask.data_pipeline.config import FrameBox
from flowmask.data_pipeline.plan.leaks import refuse_trained_on
from flowmask.data_pipeline.read.epoch_plan import spread
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Video, VideoSet
from flowmask.models.device import gpu_holds
from flowmask.models.errors import DataError, UserError
from flowmask.models.strict import read_json
from flowmask.models.text import TextEncoder, clean
from flowmask.models.vae import LatentStats, encode_pieces, normalise
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.predict.inference import DTYPES, EncoderPrecision, box_of, sides_in
from flowmask.trainer.run.validate_whole import KEY, LESS_MEMORY, KnownSentences, Parts, WholeVideos
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.protocols import protocol_named

_POSITIONS = 1024  # positions for latent frames, if the DiT's config does not state them


@contextmanager
def _named() -> Iterator[None]:
    """Inside the block, a UserError names the key."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{KEY}: {error}") from error


@_named()
def whole_videos_of(
    config: RunConfig,
    *,
    settings: Mapping[str, Any],
    fields: Mapping[str, Any],
    caches: Sequence[CacheReader],
    vae: Any,
    decoder: tuple[nn.Module, str],
    say: Callable[[str], None],
) -> WholeVideos:
    """The videos of `evaluate.whole_videos`, with this rank's data. Raises UserError for a video that can't be scored.

    settings: the conventions of the weights, as a checkpoint has them; fields: of the training cache's fingerprint
    caches:   the training's caches; empty for a stream, whose videos are unknown
    vae:      the VAE with its encoder; it is converted to the precision of the cache
    decoder:  the mask decoder and its hash
    """
    asked = config.evaluate.whole_videos
    assert asked is not None
    evaluation = EvaluateConfig(
        out=config.out,
        checkpoint=str(config.out),
        data=asked.data,
        box=asked.box or box_of({**sides_in(fields), **settings}),
        sampler=config.evaluate.sampler,
        precision=config.train.precision,
        attention=config.train.attention,
        tf32=config.train.tf32,
        protocol=asked.protocol,
    )
    source, folder = open_source(asked.data), WanFolder(config.model.wan)
    videos = chosen(source.videos(), asked.videos)
    _refuse_unscorable(videos, evaluation, wan=folder)
    if distributed.rank() == 0:
        refuse_trained_on(videos, asked.data, caches)
        if not caches:
            say(f"{KEY}: it is unknown whether these videos are in the stream of the training")
    known = {**settings, "encoder_dtype": fields.get("cache.encoder_dtype")}
    encoders = EncoderPrecision.of(known, asked=None, otherwise=config.train.precision)
    share = {place: videos[place] for place in range(distributed.rank(), len(videos), distributed.world_size())}
    parts = None
    if share:
        nn.Module.to(vae, DTYPES[encoders.video])
        clips = _clips(share, vae, evaluation.box, pixel_norm=settings["pixel_norm"])
        sentences = _sentences(share.values(), folder.text_encoder(DTYPES[encoders.text]), settings)
        parts = Parts(vae, decoder[0], sentences, clips)
    definition = _definition(evaluation, source, videos, decoder=decoder[1])
    return WholeVideos(evaluation, videos, settings, parts, definition, say)


def _clips(
    share: Mapping[int, Video], vae: Any, box: FrameBox | None, *, pixel_norm: PixelNorm
) -> dict[int, tuple[VaeClip, Tensor]]:
    """`Parts.clips` of some videos; the VAE is on the CPU before and after."""
    assert box is not None
    clips, stats = {}, LatentStats.of(vae)
    vae.to(distributed.device())
    for place, video in share.items():
        video.check_masks()
        clip = read_clip(video, range(len(video.frame_names)), box=box, pixel_norm=pixel_norm)
        with gpu_holds(f"{video} as a whole", fix=LESS_MEMORY):
            mean, _ = encode_pieces(vae, clip.pieces())
            clips[place] = clip.without_pixels(), normalise(stats, mean).cpu()
    vae.to("cpu")
    return clips


def _sentences(share: Iterable[Video], encoder: TextEncoder, settings: Mapping[str, Any]) -> KnownSentences:
    """The embeddings of all sentences; afterwards the caller may free the encoder."""
    texts = [clean(e.text, lowercase=settings["lowercase"]) for video in share for e in video.expressions]
    fix = f"build the training cache with cache.encoder_dtype=bfloat16, or do without ({KEY}=null)"
    with gpu_holds("the text encoder at work", fix=fix):
        encoder.model.to(distributed.device())
        return KnownSentences(encoder, texts, max_tokens=settings["text_tokens"])


def _definition(config: EvaluateConfig, source: VideoSet, videos: Sequence[Video], *, decoder: str) -> dict[str, Any]:
    """The settings that affect the scores and may change between two starts, in JSON types; without paths."""
    files = json.dumps([(video.video_id, video.files_digest()) for video in videos])
    return {
        **config.model_dump(mode="json", include={"box", "sampler", "protocol"}),
        "dataset": source.identity(),
        "videos": hashlib.sha256(files.encode()).hexdigest(),
        "mask_decoder": decoder,
    }


def chosen(videos: Sequence[Video], count: int) -> list[Video]:
    """`count` of the videos with sentences, or all, in order; a larger count includes a smaller one's videos."""
    some = [video for video in videos if video.expressions]
    return [some[place] for place in sorted(spread(count, len(some)).tolist())]


def _refuse_unscorable(videos: Sequence[Video], config: EvaluateConfig, *, wan: WanFolder) -> None:
    """DataError for a video without true masks, of another kind than the protocol's, or with too many frames."""
    protocol = None if config.protocol is None else protocol_named(config.protocol)
    positions = read_json(wan.path / "transformer" / "config.json").get("rope_max_seq_len", _POSITIONS)
    longest = 4 * positions - 3
    data = config.data
    for video in videos:
        if not video.has_masks:
            raise DataError(f"{video} of {data.root} ({data.split}) has no true masks; choose another split")
        if protocol is not None and config.protocol is not None:
            protocol.refuse_video(video, name=config.protocol)
        if len(video.frame_names) > longest:
            raise DataError(f"{video} has {len(video.frame_names)} frames; the DiT takes at most {longest}")
