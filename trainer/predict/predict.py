"""Masks and overlay videos of a video file or a folder of frames, for sentences that a person typed.

    out/<prompt>/<frame>.png   out/<prompt>.mp4   out/overlay.mp4 (all prompts)   out/predictions.json (last)

What a person can get wrong is found before weights are loaded. Results are built beside and moved in whole.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.config import FrameBox
from flowmask.data_pipeline.formats.picture import SUFFIXES, image_size, pictures_in, read_image
from flowmask.data_pipeline.video.video_file import VideoFile
from flowmask.models.config import AskedConventions, Precision, SamplerConfig
from flowmask.models.device import gpu_holds
from flowmask.models.errors import ConfigError, DataError
from flowmask.models.text import is_unicode
from flowmask.trainer.predict.inference import (
    FRAMES_AT_ONCE,
    LoadedSegmenter,
    chunks,
    load_segmenter,
    masks_of,
    read_clip,
)
from flowmask.trainer.predict.overlay import OverlayVideo, Rgb, colour, legend_text, read_mask, write_mask
from flowmask.trainer.predict.predictions import OVERLAY, Entry, Facts, PredictionFolder, unique_slugs
from flowmask.trainer.predict.presence import Presence, in_use, presence_of, stated

FOLDER_FPS = 10.0
# Rotary positions of Wan2.1 end at 1,024 latent frames.
_LONGEST_CLIP = 4 * 1023 + 1
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PromptResult:
    """What one prompt selected: its folder of masks, its overlay video, and its mask's area in each frame.

    presence: the number that a threshold judges; absent: whether it is below it, None without a threshold
    """

    prompt: str
    masks: Path
    overlay: Path
    area_px: list[int]
    presence: float
    absent: bool | None


@dataclass(frozen=True)
class Predictions:
    """Where everything of one prediction lies."""

    overlay: Path
    frame_names: list[str]
    fps: float
    prompts: list[PromptResult]


class InputVideo:
    """A video file, or a folder of images in natural order (2.png before 10.png), turned as their EXIF says."""

    def __init__(self, path: Path, *, fps: float | None = None, allow_truncated: bool = False) -> None:
        """fps: frames per second of the overlay; None: the file's own, 10 for a folder. Raises DataError."""
        if not is_unicode(str(path)):
            raise DataError(f"the path {str(path)!r} is not UTF-8; rename it")
        self._path = path
        self._file = None if path.is_dir() else VideoFile(path, allow_truncated=allow_truncated)
        if self._file is not None:
            self.frame_names = [f"{i:05d}" for i in range(len(self._file))]
            self.fps = fps or self._file.frames_per_second
            return
        try:
            self._images = pictures_in(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if not self._images:
            raise DataError(f"{path} holds no image ({', '.join(SUFFIXES)}); give a video or frames")
        self.frame_names = [image.stem for image in self._images]
        if wrong := [name for name in self.frame_names if not is_unicode(name)]:
            raise DataError(f"{path}: the name {wrong[0]!r} is not UTF-8; rename it")
        twice = [name for name, other in zip(self.frame_names, self.frame_names[1:]) if name == other]
        if twice:
            raise DataError(f"{path} holds two images called {twice[0]}; remove one")
        self.fps = fps or FOLDER_FPS

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self._file.size if self._file is not None else image_size(self._images[0], upright=True)

    def frames(self, ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        """rgb8 [H W 3] of each id."""
        if self._file is not None:
            return self._file.frames(ids)
        return [read_image(self._images[i], size=self.size, upright=True) for i in ids]


@gpu_holds("clip and models", fix="lower --clip-frames, --encoder-precision bf16 or CUDA_VISIBLE_DEVICES= (the CPU)")
def predict(
    video: Path,
    prompts: Sequence[str],
    *,
    checkpoint: str,
    out: Path,
    mask_decoder: str | None = None,
    wan: Path | None = None,
    ema: bool = True,
    sampler: SamplerConfig | None = None,
    box: FrameBox | None = None,
    precision: Precision = "bf16",
    encoder_precision: Precision | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    fps: float | None = None,
    max_frames: int | None = None,
    clip_frames: int | None = None,
    allow_truncated: bool = False,
    presence: str | None = None,
    conventions: AskedConventions | None = None,
    on_progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Predictions:
    """Segment what each prompt names, and draw it; what `out` has of the same video and prompt is replaced.

    box:         None: the sides that the threshold was chosen with, or the weights were trained with
    clip_frames: of clips that are judged alone: less memory, but a motion is seen within one only; None: one clip
    allow_truncated: use what is left of a video file that has lost its end
    presence: a calibrated evaluation's folder: masks of what is judged absent are empty; None: the threshold that an
              export brings; "none": no mask is emptied
    conventions: of the training, where the weights don't remember them
    on_progress: told (what, done, how many): clips, then frames; say: a line that a person should know
    """
    slugs, source = unique_slugs(prompts), InputVideo(video, fps=fps, allow_truncated=allow_truncated)
    clips = _clips(source, path=video, max_frames=max_frames, clip_frames=clip_frames)
    names = source.frame_names[: sum(map(len, clips))]
    folder = PredictionFolder(out, video=str(video), prompts=prompts)
    stated(presence, None)  # what is wrong with it is said before weights are loaded
    sampler = sampler or SamplerConfig()
    loaded = load_segmenter(
        checkpoint,
        mask_decoder=mask_decoder,
        wan=wan,
        ema=ema,
        sampler=sampler,
        precision=precision,
        encoder_precision=encoder_precision,
        device=device,
        conventions=conventions,
        say=say,
    )
    used: Facts = {"checkpoint": checkpoint, "weights": loaded.weights}
    chosen = in_use(presence, loaded.presence, **used, sampler=sampler, box=box, say=say)
    box = box or (loaded.box if chosen is None else chosen.box)
    with folder.scratch() as place:
        drawing = _Drawing(source, prompts=prompts, slugs=slugs, folder=place, earlier=folder.earlier(names), out=out)
        answers = drawing.run(loaded, clips, box=box, chosen=chosen, on_progress=on_progress)
        said = {"video": str(video), **used, "presence_threshold": None if chosen is None else chosen.threshold}
        made = folder.publish(place, slugs, answers, said | _described(source, names))
    for entry in made:
        if entry["absent"]:
            numbers = f"presence {entry['presence']:.4g} is below {entry['presence_threshold']:.4g}"
            say(f"{entry['prompt']!r} is judged absent, its masks are empty: {numbers}")
    results = [
        PromptResult(e["prompt"], out / e["masks"], out / e["overlay"], e["area_px"], e["presence"], e["absent"])
        for e in made
    ]
    return Predictions(out / made[0]["together"], names, source.fps, results)


class _Drawing:
    """Masks of all prompts, clip after clip; then, as it is known which the video holds, their overlay videos.

    earlier: predictions whose masks the combined overlay shows too, from `out`
    """

    def __init__(
        self,
        source: InputVideo,
        *,
        prompts: Sequence[str],
        slugs: Sequence[str],
        folder: Path,
        earlier: Sequence[Entry],
        out: Path,
    ) -> None:
        self._source, self._prompts = source, prompts
        self._files = [f"{name}.png" for name in source.frame_names]
        self._folders = [folder / slug for slug in slugs]
        self._earlier = [out / entry["masks"] for entry in earlier]
        shown = [*(entry["prompt"] for entry in earlier), *prompts]
        said = [legend_text(prompt, instead=f"prompt {number}") for number, prompt in enumerate(shown, 1)]
        self._shown = [(text, colour(number)) for number, text in enumerate(said)]
        self._legend = self._shown[len(earlier) :]
        for mask_folder in self._folders:
            mask_folder.mkdir()

    def run(
        self,
        loaded: LoadedSegmenter,
        clips: Sequence[range],
        *,
        box: FrameBox,
        chosen: Presence | None,
        on_progress: Progress,
    ) -> list[Facts]:
        """What predictions.json says of each prompt: its presence, the area in px of its mask in each frame."""
        answers: list[Facts] = [{"presence": 0.0, "absent": None, "area_px": []} for _ in self._prompts]
        total = sum(map(len, clips))
        for number, ids in enumerate(clips, 1):
            self._segment(loaded, ids, box, answers, share=len(ids) / total)
            on_progress("clips", number, len(clips))
        if chosen is not None:
            for answer, folder in zip(answers, self._folders):
                answer["absent"] = answer["presence"] < chosen.threshold
                if answer["absent"]:
                    self._empty(folder, answer)
        self._draw(total, on_progress)
        return answers

    def _segment(
        self, loaded: LoadedSegmenter, ids: range, box: FrameBox, answers: Sequence[Facts], *, share: float
    ) -> None:
        """Write the masks of one clip, which has a share of the video's frames."""
        clip = read_clip(self._source, ids, box=box, pixel_norm=loaded.pixel_norm)
        video_latent = loaded.encode(clip)
        for prompt, folder, answer in zip(self._prompts, self._folders, answers):
            logits = next(loaded.logits(video_latent, [prompt]))
            answer["presence"] += share * presence_of(logits, frames=clip.frames)
            for places, masks in masks_of(logits, clip):
                for place, mask in zip(places, masks):
                    write_mask(folder / self._files[ids[place]], mask)
                    answer["area_px"].append(int(mask.sum()))

    def _empty(self, folder: Path, answer: Facts) -> None:
        nothing = np.zeros(self._source.size, bool)
        for i in range(len(answer["area_px"])):
            write_mask(folder / self._files[i], nothing)
        answer["area_px"] = [0] * len(answer["area_px"])

    def _draw(self, total: int, on_progress: Progress) -> None:
        """The overlay videos of the masks that are there."""
        with ExitStack() as stack:
            alone = [(folder.name, [line]) for folder, line in zip(self._folders, self._legend)]
            *single, combined = [stack.enter_context(self._video(*of)) for of in (*alone, (OVERLAY, self._shown))]
            for ids in chunks(range(total), FRAMES_AT_ONCE):
                for i, frame in zip(ids, self._source.frames(ids)):
                    masks = [read_mask(folder / self._files[i]) for folder in (*self._earlier, *self._folders)]
                    for overlay, mask in zip(single, masks[len(self._earlier) :], strict=True):
                        overlay.add(frame, [mask])
                    combined.add(frame, masks)
                    on_progress("frames", i + 1, total)

    def _video(self, name: str, legend: list[tuple[str, Rgb]]) -> OverlayVideo:
        height, width = self._source.size
        path = self._folders[0].parent / f"{name}.mp4"
        return OverlayVideo(path, prompts=legend, height=height, width=width, fps=self._source.fps)


def _clips(source: InputVideo, *, path: Path, max_frames: int | None, clip_frames: int | None) -> list[range]:
    """The frame ids of each clip."""
    for name, value in (("max_frames", max_frames), ("clip_frames", clip_frames)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    total = min(len(source.frame_names), max_frames or len(source.frame_names))
    length = min(total, clip_frames or total)
    if length > _LONGEST_CLIP:
        raise ConfigError(
            f"{path}: a clip of {length} frames is more than the model's {_LONGEST_CLIP}; "
            "give clip_frames or max_frames"
        )
    return [range(start, min(start + length, total)) for start in range(0, total, length)]


def _described(source: InputVideo, names: Sequence[str]) -> Facts:
    """What predictions.json says of the video."""
    height, width = source.size
    return {"height": height, "width": width, "fps": source.fps, "frames": list(names)}
