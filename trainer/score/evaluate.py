"""Score a checkpoint on a dataset: each video read and encoded once, each of its sentences sampled once.

Scores are keyed by video and expression id, never by the sentence; means go over frames, then expressions.
Videos can be distributed over processes that do not communicate; the last one to finish publishes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Video, VideoSet
from flowmask.models.errors import DataError
from flowmask.trainer.predict.conventions import unlike_unasked
from flowmask.trainer.predict.inference import EncoderPrecision, LoadedSegmenter, load_segmenter
from flowmask.trainer.predict.presence import Presence, in_use, presence_in, stated
from flowmask.trainer.predict.weights import source_settings, stored_settings, trained_step
from flowmask.trainer.score.calibrate import CalibrationSet, calibrate, calibration_set
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.mask_places import MaskFiles, MaskNames
from flowmask.trainer.score.metrics import from_outside
from flowmask.trainer.score.one_video import OneVideo, VideoSettings
from flowmask.trainer.score.pipeline import evaluate_videos
from flowmask.trainer.score.protocols import numbers_by_name, protocol_named
from flowmask.trainer.score.protocols.base import BenchmarkProtocol
from flowmask.trainer.score.report.overlays import OVERLAYS
from flowmask.trainer.score.results import Scores, finish
from flowmask.trainer.score.slices import TRUTH
from flowmask.trainer.score.store import REPORT, SCORES, EvaluationStore
from flowmask.trainer.track.names import scores_group
from flowmask.trainer.track.tracking import offer_artifact, offer_metrics

# Settings that may differ between an interrupted evaluation and the one that continues it.
_FREE_KEYS = {"out", "report_examples", "sentences_per_batch", "archive", "encoder_precision"}
_BY_VALUE = {"presence", "calibrate", "conventions"}  # enter a fingerprint by their meaning


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

    A stopped evaluation continues after the last finished video. With `world` > 1 this process takes
    every world-th video; the one that completes the set publishes and gets the scores, the others get None.
    also: writes config.yaml into a folder, to be published with the rest.
    If the checkpoint has an MLflow run, it gets the scores, the report and the videos.
    Neither `world` nor `sentences_per_batch` changes any bit of a score.
    """
    source, videos, protocol = opened(config)
    chosen_on = calibration_set(config, videos)
    stated(config.presence, None)  # errors in it are reported before weights are loaded
    share = videos[rank::world]
    for video in share:
        video.check_masks()
    loaded = loaded_by(config, say)
    for line in _warnings(config, loaded):
        say(f"{config.out}: {line}")
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
        _make_records(config, loaded, share, store, names, protocol, chosen, on_progress)
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


def opened(config: EvaluateConfig) -> tuple[VideoSet, list[Video], BenchmarkProtocol | None]:
    """The dataset, its videos to score, and the protocol. Raises DataError if there is nothing to score."""
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


def loaded_by(config: EvaluateConfig, say: Callable[[str], None]) -> LoadedSegmenter:
    return load_segmenter(
        config.checkpoint,
        mask_decoder=config.mask_decoder,
        wan=config.model.wan,
        ema=config.ema,
        sampler=config.sampler,
        precision=config.precision,
        attention=config.attention,
        encoder_precision=config.encoder_precision,
        decoder_precision=config.decoder_precision,
        tf32=config.tf32,
        device=config.device,
        conventions=config.conventions,
        say=say,
    )


def _warnings(config: EvaluateConfig, loaded: LoadedSegmenter) -> Iterator[str]:
    """Settings that are probably mistakes, one line each."""
    if config.box is not None and (unlike := loaded.unlike_training(config.box)):
        yield f"{unlike}; to score at that size: box=null"
    if config.archive is not None and config.max_videos is not None:
        yield f"submission.zip will hold the first {config.max_videos} videos only; for all of them: max_videos=null"


def _make_records(
    config: EvaluateConfig,
    loaded: LoadedSegmenter,
    share: Sequence[Video],
    store: EvaluationStore,
    names: MaskNames,
    protocol: BenchmarkProtocol | None,
    chosen: Presence | None,
    on_progress: Callable[[str, int, int], None] | None,
) -> None:
    """Write masks and record of every video of this process that lacks them."""
    settings = VideoSettings(**{field.name: getattr(config, field.name) for field in fields(VideoSettings)})

    def start(video: Video) -> OneVideo:
        name = names.video(video)
        store.start_video(name)
        places = {exp_id: MaskFiles(store.mask_folder(key)) for exp_id, key in names.keys(video).items()}
        return OneVideo(settings, video, places, protocol=protocol, labels=store.labels(name), chosen=chosen)

    def report(done: int) -> None:
        if on_progress:
            on_progress("videos", done, len(share))

    left = [video for video in share if not _is_whole(store.record(names.video(video)))]
    done = len(share) - len(left)
    report(done)
    with closing(evaluate_videos(loaded, left, start, waiting=config.sentences_per_batch)) as records:
        for video, record in records:
            store.write_record(names.video(video), record)
            done += 1
            report(done)


def _in_use(config: EvaluateConfig, loaded: LoadedSegmenter, say: Callable[[str], None]) -> Presence | None:
    """The requested threshold, or that of an export; warns if it may have been chosen on these videos."""
    chosen = in_use(
        config.presence,
        loaded.presence,
        checkpoint=config.checkpoint,
        weights=loaded.weights,
        conventions=loaded.conventions,
        sampler=config.sampler,
        box=config.box or loaded.box,
        say=say,
    )
    if chosen is not None and chosen.calibration.is_of(config.data):
        say(
            f"the threshold was chosen on {config.data.source} {config.data.split}: if on the same videos, N-acc, T-acc"
            " and Final are too high; choose it on held-out videos (calibrate.data)"
        )
    return chosen


def _offer(config: EvaluateConfig, scores: Scores, *, step: int | None) -> None:
    """Give the results to the MLflow run of a checkpoint; each evaluation has a separate folder for its files.

    Two evaluations of one step (other sampling steps, another threshold) are two points of the same metrics.
    """
    group = scores_group(config.data.source, config.data.split, videos=config.max_videos)
    for name in (SCORES, REPORT, OVERLAYS):
        offer_artifact(config.checkpoint, config.out / name, to=f"{group}/{scores.fingerprint}")
    if step is not None:
        numbers = scores.totals | scores.nothing | numbers_by_name(scores.protocol)
        known = {f"{group}/{name}": value for name, value in numbers.items() if value is not None}
        offer_metrics(config.checkpoint, step, known, of=scores.fingerprint)


def fingerprint_now(config: EvaluateConfig, *, weights: Mapping[str, str], wan_files: str) -> str:
    """The fingerprint that this evaluation's scores.json would have with these weights; loads none.

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
    """Identifies everything that affects masks and scores: settings, dataset, weights, threshold or calibration."""
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE_KEYS | _BY_VALUE}
    if not config.data.allow_truncated:  # evaluations from before this key can continue
        del settings["data"]["allow_truncated"]
    if settings["tf32"] is None:  # the behaviour before this key existed
        del settings["tf32"]
    if settings["protocol"] is None:  # likewise
        del settings["protocol"]
    if settings["attention"] == "native":  # likewise
        del settings["attention"]
    if settings["decoder_precision"] == "fp32":  # likewise
        del settings["decoder_precision"]
    if config.window.frames is None:  # likewise
        del settings["window"]
    files = [(video.video_id, video.files_digest()) for video in videos]
    # metrics of packages, which records of other installations lack
    installed = from_outside()
    more: list[Any] = [installed] if installed else []
    trained = source_settings(config.checkpoint)
    encoders = EncoderPrecision.of(trained, asked=config.encoder_precision, otherwise=config.precision)
    if (encoders.text, encoders.video) != (config.precision, "fp32"):  # not as before this key existed
        more.append({"text": encoders.text, "video": encoders.video})
    if asked := unlike_unasked(trained, config.conventions):
        more.append({"conventions": asked})
    if threshold is not None:
        more.append({"presence": threshold.decides()})
    said = json.dumps([settings, source.identity(), files, dict(weights), wan_files, *more], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _is_whole(record: Mapping[str, Any] | None) -> bool:
    """Whether a video's record has all members that this version writes; earlier versions wrote fewer."""
    return record is not None and all(
        {"answered", "presence"} <= entry.keys() and (TRUTH in entry or "right" not in entry)
        for entry in record["expressions"].values()
    )
