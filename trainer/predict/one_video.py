"""One video of a prediction: checks before weights are loaded; then its masks, window after window, and the drawings.

Results are built in a scratch folder and moved in when complete.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from flowmask.data_pipeline.clip.vae_clip import VaeClip
from flowmask.data_pipeline.config import FrameBox
from flowmask.models.errors import ConfigError
from flowmask.trainer.predict.inference import LoadedSegmenter
from flowmask.trainer.predict.input_video import InputVideo
from flowmask.trainer.predict.predictions import Facts, PredictionFolder, unique_slugs
from flowmask.trainer.predict.presence import Presence
from flowmask.trainer.predict.show.drawing import Drawing
from flowmask.trainer.predict.show.overlay import write_mask
from flowmask.trainer.predict.windows.clips import Stitched, final_masks, window_clips
from flowmask.trainer.predict.windows.cut import TimeWindow, WindowConfig, cut, window_for

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class PromptResult:
    """The result of one prompt: its folder of masks, its overlay video, and its mask's area in each frame.

    presence: the number to compare with a threshold; absent: whether it is below it, None without a threshold
    rle: the masks as COCO's run-length code; figure: None unless figures were requested
    """

    prompt: str
    masks: Path
    overlay: Path
    area_px: list[int]
    presence: float
    absent: bool | None
    rle: Path | None = None
    figure: Path | None = None


@dataclass(frozen=True)
class Predictions:
    """The paths of one prediction."""

    overlay: Path
    frame_names: list[str]
    fps: float
    prompts: list[PromptResult]


class VideoPrediction:
    """A video and its prompts, before weights are loaded; raises UserError for input that can't be used."""

    def __init__(
        self,
        video: Path,
        prompts: Sequence[str],
        *,
        out: Path,
        fps: float | None,
        max_frames: int | None,
        window: WindowConfig | None,
        allow_truncated: bool,
        threshold: float,
        figures: bool,
        say: Say,
    ) -> None:
        self.video, self._prompts, self.out, self._say = video, prompts, out, say
        self._slugs, self._threshold, self._figures = unique_slugs(prompts), threshold, figures
        self._source = InputVideo(video, fps=fps, allow_truncated=allow_truncated)
        for note in self._source.notes:
            say(f"{video}: {note}")
        self._windows = _windows(len(self._source.frame_names), window, max_frames=max_frames, say=say)
        self._names = self._source.frame_names[: self._windows[0].total]
        self._folder = PredictionFolder(out, video=str(video), prompts=prompts)

    def run(
        self, loaded: LoadedSegmenter, *, box: FrameBox, chosen: Presence | None, used: Facts, on_progress: Progress
    ) -> Predictions:
        """Segment the object of each prompt, draw it and publish it.

        used: facts about the weights for predictions.json.
        """
        with self._folder.scratch() as place:
            folders = [place / slug for slug in self._slugs]
            answers = self._segment(loaded, folders, box=box, on_progress=on_progress)
            if chosen is not None:
                self._judge(answers, folders, chosen)
            self._draw(folders, on_progress)
            facts = used | {"presence_threshold": None if chosen is None else chosen.threshold} | self._described()
            made = self._folder.publish(place, self._slugs, answers, facts)
        for entry in made:
            if entry["absent"]:
                numbers = f"presence {entry['presence']:.4g} is below {entry['presence_threshold']:.4g}"
                self._say(f"{entry['prompt']!r} was judged absent, so its masks are empty: {numbers}")
            elif not any(entry["area_px"]):
                reached = f"no pixel of any frame is above the threshold {self._threshold}"
                self._say(f"{entry['prompt']!r}: all masks are empty, because {reached}")
        return Predictions(
            self.out / made[0]["together"], self._names, self._source.fps, [_result(self.out, e) for e in made]
        )

    def _segment(
        self, loaded: LoadedSegmenter, folders: Sequence[Path], *, box: FrameBox, on_progress: Progress
    ) -> list[Facts]:
        """Write all masks; returns for each prompt its presence, and the mask's area in px in each frame."""
        for folder in folders:
            folder.mkdir()
        answers, areas = [Stitched() for _ in folders], [list[int]() for _ in folders]
        clips = window_clips(self._source, self._windows, box=box, pixel_norm=loaded.pixel_norm)
        windows, sentences = len(self._windows), len(self._windows) * len(folders)

        def write(window: TimeWindow, place: int, logits: Tensor, sizes: VaeClip) -> None:
            final = answers[place].add(window, logits)
            for ids, masks in final_masks(window, final, sizes, threshold=self._threshold):
                for i, mask in zip(ids, masks):
                    write_mask(folders[place] / f"{self._names[i]}.png", mask)
                    areas[place].append(int(mask.sum()))

        def sampled() -> Iterator[Callable[[], None]]:
            for window, clip in clips:
                video_latent, sizes = loaded.encode(clip), clip.without_pixels()
                for place, prompt in enumerate(self._prompts):
                    yield partial(write, window, place, next(loaded.logits(video_latent, [prompt])), sizes)

        on_progress("windows", 0, windows)
        on_progress("sentences", 0, sentences)
        for done in _written(sampled()):
            on_progress("sentences", done, sentences)
            if done % len(folders) == 0:
                on_progress("windows", done // len(folders), windows)
        return [{"presence": said.presence, "absent": None, "area_px": area} for said, area in zip(answers, areas)]

    def _judge(self, answers: Sequence[Facts], folders: Sequence[Path], chosen: Presence) -> None:
        """Empty the masks of sentences whose object is judged absent."""
        nothing = np.zeros(self._source.size, bool)
        for answer, folder in zip(answers, folders):
            answer["absent"] = answer["presence"] < chosen.threshold
            if answer["absent"]:
                for name in self._names:
                    write_mask(folder / f"{name}.png", nothing)
                answer["area_px"] = [0] * len(self._names)

    def _draw(self, folders: Sequence[Path], on_progress: Progress) -> None:
        total = len(self._names)
        entries = self._folder.earlier(self._names, source_frames=self._source.source_frames)
        earlier = [(entry["prompt"], self.out / entry["masks"]) for entry in entries]
        drawing = Drawing(self._source, prompts=self._prompts, folders=folders, earlier=earlier, figures=self._figures)
        on_progress("frames", 0, total)
        if problem := drawing.draw(total, on_frame=lambda done: on_progress("frames", done, total)):
            self._say(f"{self.video}: a part of its sound can't be read and is missing in the overlays: {problem}")

    def _described(self) -> Facts:
        """Facts about the video and its masks for predictions.json."""
        (height, width), source = self._source.size, self._source
        chosen = source.source_frames and source.source_frames[: len(self._names)]
        size: Facts = {"video": str(self.video), "height": height, "width": width}
        return size | {
            "fps": source.fps,
            "frames": self._names,
            "source_frames": chosen,
            "mask_threshold": self._threshold,
        }


def _result(out: Path, entry: Facts) -> PromptResult:
    figure = out / entry["figure"] if "figure" in entry else None
    masks, overlay, rle = (out / entry[key] for key in ("masks", "overlay", "rle"))
    return PromptResult(
        entry["prompt"], masks, overlay, entry["area_px"], entry["presence"], entry["absent"], rle, figure
    )


def _written(masks: Iterator[Callable[[], None]]) -> Iterator[int]:
    """The number of written sentences, after each; a thread writes one while the models compute the next."""
    with ThreadPoolExecutor(1, "write") as writer:
        before: Future[None] | None = None
        for done, write in enumerate(masks):
            if before is not None:
                before.result()
                yield done
            before = writer.submit(write)
        if before is not None:
            before.result()
            yield done + 1


def _windows(frames: int, window: WindowConfig | None, *, max_frames: int | None, say: Say) -> list[TimeWindow]:
    """The windows of a video of `frames` frames."""
    if max_frames is not None and max_frames < 1:
        raise ConfigError(f"max_frames is {max_frames}; it must be at least 1")
    total = min(frames, max_frames or frames)
    asked = window or WindowConfig()
    windows = cut(total, used := window_for(total, asked))
    if used != asked:
        said = f"{len(windows)} windows of {used.frames} with overlap {used.overlap}"
        say(f"the video has {total} frames: {said}, since larger ones need more memory (--window-frames)")
    return windows
