"""Masks and overlay videos of a video file or a folder of frames, for sentences that a person typed.

    out/<prompt>/<frame>.png   out/<prompt>.mp4   out/overlay.mp4 (all prompts)   out/predictions.json (last)

What a person can get wrong is found before weights are loaded. Results are built beside and moved in whole.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flowmask.data_pipeline.clip.vae_clip import FRAMES_AT_ONCE, VaeClip, chunks
from flowmask.data_pipeline.config import FrameBox
from flowmask.models.config import AskedConventions, Precision, SamplerConfig
from flowmask.models.device import gpu_holds
from flowmask.models.errors import ConfigError
from flowmask.trainer.predict.inference import LoadedSegmenter, load_segmenter
from flowmask.trainer.predict.input_video import InputVideo
from flowmask.trainer.predict.overlay import OverlayVideo, Rgb, colour, legend_text, read_mask, write_mask
from flowmask.trainer.predict.predictions import OVERLAY, Entry, Facts, PredictionFolder, unique_slugs
from flowmask.trainer.predict.presence import Presence, in_use, stated
from flowmask.trainer.predict.windows.clips import Stitched, final_masks, window_clips
from flowmask.trainer.predict.windows.cut import TimeWindow, WindowConfig, cut, window_for

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


@gpu_holds("clip and models", fix="lower --window-frames, --encoder-precision bf16 or CUDA_VISIBLE_DEVICES= (the CPU)")
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
    window: WindowConfig | None = None,
    allow_truncated: bool = False,
    presence: str | None = None,
    conventions: AskedConventions | None = None,
    on_progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Predictions:
    """Segment what each prompt names, and draw it; what `out` has of the same video and prompt is replaced.

    box:         None: the sides that the threshold was chosen with, or the weights were trained with
    window:      without frames: the whole video up to 121 frames, else windows of 81
    allow_truncated: use what is left of a video file that has lost its end
    presence: a calibrated evaluation's folder: masks of what is judged absent are empty; None: the threshold that an
              export brings; "none": no mask is emptied
    conventions: of the training, where the weights don't remember them
    on_progress: told (what, done, how many): windows, then frames; say: a line that a person should know
    """
    slugs, source = unique_slugs(prompts), InputVideo(video, fps=fps, allow_truncated=allow_truncated)
    windows = _windows(len(source.frame_names), window, max_frames=max_frames, say=say)
    names = source.frame_names[: windows[0].total]
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
    belongs: Facts = {"conventions": loaded.conventions, "sampler": sampler, "box": box}
    chosen = in_use(presence, loaded.presence, **used, **belongs, say=say)
    box = box or (loaded.box if chosen is None else chosen.box)
    with folder.scratch() as place:
        drawing = _Drawing(source, prompts=prompts, slugs=slugs, folder=place, earlier=folder.earlier(names), out=out)
        answers = drawing.run(loaded, windows, box=box, chosen=chosen, on_progress=on_progress)
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
    """Masks of all prompts, window after window; then, as it is known which the video holds, their overlay videos.

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
        windows: Sequence[TimeWindow],
        *,
        box: FrameBox,
        chosen: Presence | None,
        on_progress: Progress,
    ) -> list[Facts]:
        """What predictions.json says of each prompt: its presence, the area in px of its mask in each frame."""
        answers, areas = [Stitched() for _ in self._prompts], [list[int]() for _ in self._prompts]
        clips = window_clips(self._source, windows, box=box, pixel_norm=loaded.pixel_norm)
        for number, (window, clip) in enumerate(clips, 1):
            self._segment(loaded, window, clip, answers, areas)
            on_progress("windows", number, len(windows))
        facts: list[Facts] = [
            {"presence": answer.presence, "absent": None, "area_px": area} for answer, area in zip(answers, areas)
        ]
        if chosen is not None:
            for fact, folder in zip(facts, self._folders):
                fact["absent"] = fact["presence"] < chosen.threshold
                if fact["absent"]:
                    self._empty(folder, fact)
        self._draw(windows[0].total, on_progress)
        return facts

    def _segment(
        self,
        loaded: LoadedSegmenter,
        window: TimeWindow,
        clip: VaeClip,
        answers: Sequence[Stitched],
        areas: Sequence[list[int]],
    ) -> None:
        """Write the masks that are final with a window."""
        video_latent = loaded.encode(clip)
        for prompt, folder, answer, area in zip(self._prompts, self._folders, answers, areas):
            logits = answer.add(window, next(loaded.logits(video_latent, [prompt])))
            for ids, masks in final_masks(window, logits, clip):
                for i, mask in zip(ids, masks):
                    write_mask(folder / self._files[i], mask)
                    area.append(int(mask.sum()))

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


def _windows(
    frames: int, window: WindowConfig | None, *, max_frames: int | None, say: Callable[[str], None]
) -> list[TimeWindow]:
    """The windows of a video of so many frames."""
    if max_frames is not None and max_frames < 1:
        raise ConfigError(f"max_frames is {max_frames}; it must be at least 1")
    total = min(frames, max_frames or frames)
    asked = window or WindowConfig()
    windows = cut(total, used := window_for(total, asked))
    if used != asked:
        said = f"{len(windows)} windows of {used.frames} with overlap {used.overlap}"
        say(f"the video has {total} frames: {said}, as larger ones need more memory (--window-frames)")
    return windows


def _described(source: InputVideo, names: Sequence[str]) -> Facts:
    """What predictions.json says of the video."""
    height, width = source.size
    return {"height": height, "width": width, "fps": source.fps, "frames": list(names)}
