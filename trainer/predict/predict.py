"""Masks and overlay videos of video files or folders of frames, for sentences.

    out/<prompt>/<frame>.png   out/<prompt>.mp4   out/<prompt>.rle.json   out/<prompt>.png (a figure, if requested)
    out/overlay.mp4 (all prompts)   out/predictions.json (last)

User errors are found before weights are loaded. Results are built in a scratch folder and moved in when complete.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flowmask.data_pipeline.config import FrameBox
from flowmask.models.config import AskedConventions, Attention, Precision, SamplerConfig
from flowmask.models.device import gpu_holds
from flowmask.models.errors import ConfigError, UserError
from flowmask.trainer.predict.inference import LoadedSegmenter, load_segmenter
from flowmask.trainer.predict.one_video import Predictions, Progress, PromptResult, Say, VideoPrediction
from flowmask.trainer.predict.predictions import Facts, unique_slugs
from flowmask.trainer.predict.presence import in_use, stated
from flowmask.trainer.predict.windows.cut import WindowConfig

__all__ = ["Predictions", "PromptResult", "predict", "predict_videos"]

_LESS_MEMORY = "lower --window-frames, --encoder-precision bf16 or CUDA_VISIBLE_DEVICES= (the CPU)"


def predict(video: Path, prompts: Sequence[str], *, out: Path, **options: Any) -> Predictions:
    """Segment the object of each prompt in one video, and draw it; `options`: see `predict_videos`."""
    return predict_videos({out: video}, prompts, **options)[0]


def predict_videos(
    videos: Mapping[Path, Path],
    prompts: Sequence[str],
    *,
    checkpoint: str,
    mask_decoder: str | None = None,
    wan: Path | None = None,
    ema: bool = True,
    sampler: SamplerConfig | None = None,
    box: FrameBox | None = None,
    precision: Precision = "bf16",
    attention: Attention = "native",
    encoder_precision: Precision | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    fps: float | None = None,
    max_frames: int | None = None,
    window: WindowConfig | None = None,
    allow_truncated: bool = False,
    presence: str | None = None,
    threshold: float = 0.5,
    figures: bool = False,
    conventions: AskedConventions | None = None,
    on_progress: Progress = lambda what, done, total: None,
    say: Say = lambda line: None,
    load: Callable[..., LoadedSegmenter] = load_segmenter,
) -> list[Predictions]:
    """Segment the object of each prompt in each video, and draw it; replaces earlier results of a video and prompt.

    videos:      each with the folder for its results. All are checked before weights are loaded. If one of several
                 fails later, the others are completed, and a UserError at the end names the failed ones
    box:         None: the sides of the presence threshold's choice, or of the training
    fps:         of a file: sample frames at this rate; None, or a rate not below the file's: all frames.
                 Of a folder of frames: rate of the overlay, 10 by default
    max_frames:  largest number of those frames, from the start
    window:      without frames: the whole video up to 121 frames, else windows of 81
    allow_truncated: use the readable frames of a truncated video file
    presence: a calibrated evaluation's folder: masks of absent objects are emptied; None: the threshold of the
              export; "none": no mask is emptied
    threshold:   the probability above which a pixel belongs to a mask; the number of presence does not depend on it
    figures:     also a PNG of some frames for each prompt
    conventions: of the training, if the weights don't record them
    on_progress: called with (what, done, total) before and after each piece: videos, weights, windows, sentences,
    frames
    say:         receives messages for the user
    load:        returns the segmenter; a caller that predicts repeatedly passes one that it keeps
    """
    unique_slugs(prompts)
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold is {threshold:g}; it must be above 0 and below 1; the default is 0.5")
    asked: dict[str, Any] = {"fps": fps, "max_frames": max_frames, "window": window, "threshold": threshold}
    asked |= {"allow_truncated": allow_truncated, "figures": figures, "say": say}
    checked = []
    for number, (out, video) in enumerate(videos.items()):
        on_progress("videos", number, len(videos))
        checked.append(VideoPrediction(video, prompts, out=out, **asked))
    on_progress("videos", len(videos), len(videos))
    stated(presence, None)  # errors in it are reported before weights are loaded
    sampler = sampler or SamplerConfig()
    on_progress("weights", 0, 1)
    with gpu_holds("clip and models", fix=_LESS_MEMORY):
        loaded = load(
            checkpoint,
            mask_decoder=mask_decoder,
            wan=wan,
            ema=ema,
            sampler=sampler,
            precision=precision,
            attention=attention,
            encoder_precision=encoder_precision,
            device=device,
            conventions=conventions,
            say=say,
        )
    on_progress("weights", 1, 1)
    used: Facts = {"checkpoint": checkpoint, "weights": loaded.weights}
    belongs: Facts = {"conventions": loaded.conventions, "sampler": sampler, "box": box}
    chosen = in_use(presence, loaded.presence, **used, **belongs, say=say)
    box = box or (loaded.box if chosen is None else chosen.box)
    settings = {"sampler": sampler.model_dump(mode="json"), "box": box.model_dump(mode="json")}
    return _run(checked, loaded, on_progress, say, box=box, chosen=chosen, used=used | settings)


def _run(
    checked: list[VideoPrediction], loaded: LoadedSegmenter, on_progress: Progress, say: Say, **settings: Any
) -> list[Predictions]:
    """One video after another; UserError at the end for those that failed."""
    done, failed = [], []
    for video in checked:

        def update(what: str, number: int, total: int, name: str = video.out.name) -> None:
            on_progress(what if len(checked) == 1 else f"{name}: {what}", number, total)

        try:
            with gpu_holds("clip and models", fix=_LESS_MEMORY):
                done.append(video.run(loaded, on_progress=update, **settings))
        except UserError as error:
            if len(checked) == 1:
                raise
            failed.append(f"{video.video}: {error}")
            say(failed[-1])
    if failed:
        raise UserError(f"{len(failed)} of {len(checked)} videos failed, the others are done: {'; '.join(failed)}")
    return done
