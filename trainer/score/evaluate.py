"""Score a checkpoint on a dataset: each video read and encoded once, each sentence sampled on its own.

Scores are keyed by video and expression id, never by the sentence; means go over frames, then expressions.
Videos can be shared out over processes that know nothing of each other; whoever finishes last publishes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Video, VideoSet
from flowmask.models.errors import DataError
from flowmask.trainer.predict.inference import (
    EncoderPrecision,
    LoadedSegmenter,
    chunks,
    load_segmenter,
    masks_of,
    read_clip,
)
from flowmask.trainer.predict.overlay import write_mask
from flowmask.trainer.predict.presence import Presence, emptied, in_use, presence_in, presence_of, stated
from flowmask.trainer.predict.weights import source_settings, stored_settings, trained_step
from flowmask.trainer.score.calibrate import CalibrationSet, calibrate, calibration_set
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.judging import score_decoder, score_masks
from flowmask.trainer.score.mask_names import MaskNames
from flowmask.trainer.score.metrics import from_outside
from flowmask.trainer.score.protocols import protocol_named
from flowmask.trainer.score.protocols.base import BenchmarkProtocol
from flowmask.trainer.score.report.overlays import OVERLAYS
from flowmask.trainer.score.results import Scores, finish
from flowmask.trainer.score.slices import TRUTH
from flowmask.trainer.score.store import REPORT, SCORES, EvaluationStore
from flowmask.trainer.track.tracking import offer_artifact, offer_metrics

# What may differ between an evaluation that was interrupted and the one that continues it.
_FREE_KEYS = {"out", "report_examples", "sentences_per_batch", "archive", "encoder_precision"}
_BY_VALUE = {"presence", "calibrate"}  # enter a fingerprint by what they mean


def evaluate(
    config: EvaluateConfig,
    *,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
    also: Callable[[Path], None] = lambda folder: None,
) -> Scores | None:
    """Write out/{masks/, report.html, overlays/, scores.json} and return the scores.

    With `calibrate` the threshold of presence is chosen first (calibrate.py); masks below a threshold are emptied.

    An evaluation that was stopped goes on behind the last finished video. With `world` > 1 this process takes
    every world-th video; the one that completes the set publishes and gets the scores, the others get None.
    also: writes config.yaml into a folder, to be published with the rest.
    The MLflow run of a checkpoint that has one is left the scores, the report and the videos.
    `sentences_per_batch` changes logits by rounding alone (about 1e-5 in fp32, 1e-2 in bf16): only pixels
    that near the threshold can flip.
    """
    source, videos, protocol = _opened(config)
    chosen_on = calibration_set(config, videos)
    stated(config.presence, None)  # what is wrong with it is said before weights are loaded
    share = videos[rank::world]
    for video in share:
        video.check_masks()
    loaded = _loaded(config, say)
    chosen = None if chosen_on is not None else _in_use(config, loaded, say)
    step = trained_step(config.checkpoint)
    fingerprint = _fingerprint(
        config, source, videos, weights=loaded.weights, wan_files=loaded.wan_files, threshold=chosen_on or chosen
    )
    store = EvaluationStore(config.out, fingerprint)
    names = MaskNames(videos)
    with store.claim(rank):
        if chosen_on is not None:
            chosen = calibrate(config, chosen_on, loaded, store, rank=rank, world=world, on_progress=on_progress)
            say(f"presence threshold {chosen.said()}")
        for done, video in enumerate(share):
            if on_progress:
                on_progress("videos", done, len(share))
            name = names.video(video)
            if not _is_whole(store.record(name)):
                store.start_video(name)
                folders = {exp_id: store.mask_folder(key) for exp_id, key in names.keys(video).items()}
                record = _evaluate_video(
                    config, loaded, video, folders, protocol=protocol, labels=store.labels(name), chosen=chosen
                )
                store.write_record(name, record)
        if on_progress:
            on_progress("videos", len(share), len(share))
        made: list[Scores] = []

        def build(masks: Path, place: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
            also(place)
            scores = finish(
                config,
                videos,
                masks,
                records,
                out=place,
                weights=loaded.weights,
                presence=chosen,
                fingerprint=fingerprint,
                step=step,
            )
            made.append(scores)
            return made[0].to_json()

        if not store.publish_if_complete([names.video(video) for video in videos], build):
            return None
    _offer(config, made[0], step=step)
    return made[0]


def _opened(config: EvaluateConfig) -> tuple[VideoSet, list[Video], BenchmarkProtocol | None]:
    """The dataset, the videos of it that are scored, and the protocol; DataError where there is nothing to score."""
    source = open_source(config.data)
    videos = list(source.videos())[: config.max_videos]
    if not any(video.expressions for video in videos):
        raise DataError(f"{config.data.root} ({config.data.split}) holds no expression; there is nothing to evaluate")
    if config.protocol is None:
        return source, videos, None
    protocol = protocol_named(config.protocol)
    for video in videos:
        protocol.refuse_video(video, name=config.protocol)
    return source, videos, protocol


def _loaded(config: EvaluateConfig, say: Callable[[str], None]) -> LoadedSegmenter:
    return load_segmenter(
        config.checkpoint,
        mask_decoder=config.mask_decoder,
        wan=config.model.wan,
        ema=config.ema,
        sampler=config.sampler,
        precision=config.precision,
        encoder_precision=config.encoder_precision,
        tf32=config.tf32,
        device=config.device,
        say=say,
    )


def _in_use(config: EvaluateConfig, loaded: LoadedSegmenter, say: Callable[[str], None]) -> Presence | None:
    """The threshold that is asked for, or that an export brings."""
    return in_use(
        config.presence,
        loaded.presence,
        checkpoint=config.checkpoint,
        weights=loaded.weights,
        sampler=config.sampler,
        box=config.box or loaded.box,
        say=say,
    )


def _offer(config: EvaluateConfig, scores: Scores, *, step: int | None) -> None:
    """Leave the results for the MLflow run of a checkpoint; numbers only of a whole split, as their names say that."""
    for name in (SCORES, REPORT, OVERLAYS):
        offer_artifact(config.checkpoint, config.out / name, to="evaluation")
    if step is not None and config.max_videos is None:
        numbers = {name: value for name, value in (scores.totals | scores.nothing).items() if value is not None}
        what = f"test/{config.data.source}/{config.data.split}"
        offer_metrics(config.checkpoint, step, {f"{what}/{name}": value for name, value in numbers.items()})


def fingerprint_now(config: EvaluateConfig, *, weights: Mapping[str, str], wan_files: str) -> str:
    """What scores.json of this evaluation would have as its fingerprint with these weights; loads none.

    weights, wan_files: as `LoadedSegmenter` has them.
    """
    source = open_source(config.data)
    videos = list(source.videos())[: config.max_videos]
    threshold: CalibrationSet | Presence | None = calibration_set(config, videos)
    if threshold is None:
        baked = presence_in(stored_settings(config.checkpoint), where=config.checkpoint)
        threshold = stated(config.presence, baked)
    return _fingerprint(config, source, videos, weights=weights, wan_files=wan_files, threshold=threshold)


def _fingerprint(
    config: EvaluateConfig,
    source: VideoSet,
    videos: Sequence[Video],
    *,
    weights: Mapping[str, str],
    wan_files: str,
    threshold: CalibrationSet | Presence | None,
) -> str:
    """Names what shapes the masks and scores: settings, dataset, weights, the threshold or what it is chosen on."""
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE_KEYS | _BY_VALUE}
    if not config.data.allow_truncated:  # evaluations from before this key go on
        del settings["data"]["allow_truncated"]
    if settings["tf32"] is None:  # as it was before it could be said
        del settings["tf32"]
    if settings["protocol"] is None:  # likewise
        del settings["protocol"]
    files = [(video.video_id, video.files_digest()) for video in videos]
    more: list[Any] = [from_outside()] if from_outside() else []  # metrics that records of other installations lack
    trained = source_settings(config.checkpoint)
    encoders = EncoderPrecision.of(trained, asked=config.encoder_precision, otherwise=config.precision)
    if (encoders.text, encoders.video) != (config.precision, "fp32"):  # what it was before training's was followed
        more.append({"text": encoders.text, "video": encoders.video})
    if threshold is not None:
        more.append({"presence": threshold.decides()})
    said = json.dumps([settings, source.identity(), files, dict(weights), wan_files, *more], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _evaluate_video(
    config: EvaluateConfig,
    loaded: LoadedSegmenter,
    video: Video,
    folders: Mapping[str, Path],
    *,
    protocol: BenchmarkProtocol | None,
    labels: Path,
    chosen: Presence | None = None,
) -> dict[str, Any]:
    """Masks of every expression into its folder, which `folders` gives by its id; returns the video's record.

    labels: a folder that is not there yet, for label maps of a protocol that makes some
    chosen: the threshold of presence, if there is one
    """
    names = video.frame_names
    listener = None if protocol is None else protocol.listener(video, labels)
    clip = read_clip(video, range(len(names)), box=config.box or loaded.box, pixel_norm=loaded.pixel_norm)
    video_latent = loaded.encode(clip)
    record: dict[str, Any] = {"frames": len(names), "expressions": {}}
    for some in chunks(video.expressions, config.sentences_per_batch):
        for expression, logits in zip(some, loaded.logits(video_latent, [e.text for e in some])):
            seen, answered = presence_of(logits, frames=clip.frames), False
            logits = emptied(logits, seen, chosen)
            if listener is not None:
                listener.hear(expression, logits, clip)
            for ids, masks in masks_of(logits, clip):
                answered |= bool(masks.any())
                for i, mask in zip(ids, masks):
                    write_mask(folders[expression.exp_id] / f"{names[i]}.png", mask)
            record["expressions"][expression.exp_id] = {"text": expression.text, "answered": answered, "presence": seen}
    if not video.has_masks:
        return record
    answers = score_masks(config, video, folders, record["expressions"])
    if protocol is not None:
        record["protocol"] = protocol.of_video(video, answers, listener)
    if config.decoder_score:
        score_decoder(loaded, video, clip, record["expressions"])
    return record


def _is_whole(record: Mapping[str, Any] | None) -> bool:
    """Whether a video's record has all that this version writes: those of earlier ones lack some of it."""
    return record is not None and all(
        {"answered", "presence"} <= entry.keys() and (TRUTH in entry or "right" not in entry)
        for entry in record["expressions"].values()
    )
