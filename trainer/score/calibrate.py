"""Chooses the presence threshold on videos that are not scored (`calibrate.data`), before the evaluation.

A process judges its share of the videos, then any that no other process has recorded, so no process waits for
another. One process chooses, and all use its choice. No mask is written. A restart continues after the last video.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.plan.leaks import family_of
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Video, VideoSet, names_nothing
from flowmask.models.errors import ConfigError
from flowmask.trainer.predict.inference import LoadedSegmenter
from flowmask.trainer.predict.presence import RULE, Calibration, Judged, Presence, sweep
from flowmask.trainer.predict.windows.clips import Stitched, final_masks, window_clips
from flowmask.trainer.predict.windows.cut import cut
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.mask_places import MaskNames
from flowmask.trainer.score.one_video import sentences_of
from flowmask.trainer.score.store import EvaluationStore

_SHOWN = 4


@dataclass(frozen=True)
class CalibrationSet:
    """The videos with sentences on which a threshold is chosen."""

    data: DataSourceConfig
    source: VideoSet
    videos: Sequence[Video]

    def decides(self) -> dict[str, Any]:
        """The settings that change the choice, for a fingerprint."""
        files = [(video.video_id, video.files_digest()) for video in self.videos]
        return {
            "rule": RULE,
            "data": self.data.model_dump(mode="json"),
            "identity": self.source.identity(),
            "files": files,
        }


def calibration_set(config: EvaluateConfig, scored: Sequence[Video]) -> CalibrationSet | None:
    """The dataset of `calibrate.data`, None unless it is enabled; reads only annotations.

    scored: the evaluated videos. Raises ConfigError if both sets share a video, if a video has no true masks, or if
    sentences of one kind are missing.
    """
    data = config.calibrate.data
    if not config.calibrate.enabled or data is None:
        return None
    named, source = f"calibrate.data is {data.split} of {data.root}", open_source(data)
    videos = [video for video in source.videos() if video.expressions]
    if family_of(data) == family_of(config.data):
        ids = {video.video_id for video in scored}
        if both := sorted(video.video_id for video in videos if video.video_id in ids):
            more = ", ..." if len(both) > _SHOWN else ""
            raise ConfigError(
                f"{named}, which shares {len(both)} videos with data ({', '.join(both[:_SHOWN])}{more}): a threshold "
                "must be chosen on other videos than the scored ones; give another split"
            )
    if unknown := next((video for video in videos if not video.has_masks), None):
        raise ConfigError(f"{named}, where {unknown} has no true masks; give a split with true masks")
    kinds = {names_nothing(video, expression) for video in videos for expression in video.expressions}
    if lacking := [said for kind, said in ((True, "nothing"), (False, "something")) if kind not in kinds]:
        raise ConfigError(
            f"{named}, where no sentence names {lacking[0]}: so no threshold can be chosen; give a split with both"
        )
    return CalibrationSet(data, source, videos)


def calibrate(
    config: EvaluateConfig,
    chosen_on: CalibrationSet,
    loaded: LoadedSegmenter,
    store: EvaluationStore,
    *,
    rank: int,
    world: int,
    on_progress: Callable[[str, int, int], None] | None,
) -> Presence:
    """Judge every sentence of the set and choose the threshold; the same in every process."""
    names = MaskNames(chosen_on.videos)
    for done, video in enumerate(_own_first(chosen_on.videos, rank=rank, world=world)):
        if on_progress:
            on_progress("calibrate", done, len(chosen_on.videos))
        if store.judged(names.video(video)) is None:
            judged = _judge(config, loaded, video)
            store.note_judged(names.video(video), [asdict(one) for one in judged])
    if on_progress:
        on_progress("calibrate", len(chosen_on.videos), len(chosen_on.videos))

    def choose() -> Mapping[str, Any]:
        noted = [store.judged(names.video(video)) or [] for video in chosen_on.videos]
        judged = [Judged(**one) for of_video in noted for one in of_video]
        threshold, n_acc, t_acc = sweep(judged)
        calibration = Calibration(
            source=chosen_on.data.source,
            split=chosen_on.data.split,
            sentences=len(judged),
            no_target=sum(not one.has_target for one in judged),
            n_acc=n_acc,
            t_acc=t_acc,
        )
        return Presence(
            rule=RULE,
            threshold=threshold,
            weights=loaded.weights,
            conventions=loaded.conventions,
            sampler=config.sampler,
            box=config.box or loaded.box,
            calibration=calibration,
        ).model_dump(mode="json")

    return Presence.model_validate(store.chosen_once(choose))


def _own_first(videos: Sequence[Video], *, rank: int, world: int) -> Iterator[Video]:
    """Every video once: this process's share, then those of the others in reverse order."""
    yield from videos[rank::world]
    for other in range(rank + 1, rank + world):
        yield from reversed(videos[other % world :: world])


def _judge(config: EvaluateConfig, loaded: LoadedSegmenter, video: Video) -> Iterator[Judged]:
    """Each sentence of a video, by the masks that an evaluation would write."""
    answers, answered = defaultdict[str, Stitched](Stitched), defaultdict[str, bool](bool)
    windows, box = cut(len(video.frame_names), config.window), config.box or loaded.box
    for window, clip in window_clips(video, windows, box=box, pixel_norm=loaded.pixel_norm):
        for expression, logits in sentences_of(video, loaded, loaded.encode(clip)):
            final = answers[expression.exp_id].add(window, logits)
            answered[expression.exp_id] |= any(bool(masks.any()) for _, masks in final_masks(window, final, clip))
            if window.is_last:
                has_target = not names_nothing(video, expression)
                yield Judged(answers[expression.exp_id].presence, answered[expression.exp_id], has_target)
