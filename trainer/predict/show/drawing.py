"""Draws a prediction from its written masks, frame by frame, for a video of any length."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from flowmask.data_pipeline.clip.vae_clip import FRAMES_AT_ONCE, chunks
from flowmask.trainer.predict.input_video import InputVideo
from flowmask.trainer.predict.predictions import BESIDE, OVERLAY
from flowmask.trainer.predict.show.figure import FigureStrip, evenly
from flowmask.trainer.predict.show.overlay import OverlayVideo, Rgb, colour, legend_text, read_mask
from flowmask.trainer.predict.show.run_lengths import RunLengthFile


class Drawing:
    """The overlay videos, run-length masks and figures of one video's prompts, next to their folders of masks."""

    def __init__(
        self,
        source: InputVideo,
        *,
        prompts: Sequence[str],
        folders: Sequence[Path],
        earlier: Sequence[tuple[str, Path]],
        figures: bool,
    ) -> None:
        """folders: with each prompt's masks; earlier: prompts and masks that the combined overlay also shows, first."""
        self._source, self._folders, self._figures = source, folders, figures
        self._earlier = [folder for _, folder in earlier]
        shown = [*(prompt for prompt, _ in earlier), *prompts]
        said = [legend_text(prompt, instead=f"prompt {number}") for number, prompt in enumerate(shown, 1)]
        self._shown = [(text, colour(number)) for number, text in enumerate(said)]
        self._legend = self._shown[len(earlier) :]

    def draw(self, total: int, *, on_frame: Callable[[int], None]) -> str:
        """Draw the first `total` frames; returns why a part of the sound is missing, or "".

        on_frame: receives the number of drawn frames.
        """
        chosen = set(evenly(total) if self._figures else [])
        height, width = self._source.size
        strips = [FigureStrip(*line, height=height, width=width) for line in self._legend]
        with ExitStack() as stack:
            alone = [(folder.name, [line]) for folder, line in zip(self._folders, self._legend)]
            *single, combined = [stack.enter_context(self._video(*of)) for of in (*alone, (OVERLAY, self._shown))]
            lengths = [stack.enter_context(RunLengthFile(_beside(folder, "rle"))) for folder in self._folders]
            for ids in chunks(range(total), FRAMES_AT_ONCE):
                for i, frame in zip(ids, self._source.frames(ids)):
                    name = self._source.frame_names[i]
                    masks = [read_mask(folder / f"{name}.png") for folder in (*self._earlier, *self._folders)]
                    combined.add(frame, masks)
                    for overlay, rle, strip, mask in zip(single, lengths, strips, masks[len(self._earlier) :]):
                        overlay.add(frame, [mask])
                        rle.add(name, mask)
                        if i in chosen:
                            strip.add(frame, mask, self._source.label(i))
                    on_frame(i + 1)
        for folder, strip in zip(self._folders, strips if self._figures else []):
            strip.save(_beside(folder, "figure"))
        return combined.sound_problem

    def _video(self, name: str, legend: list[tuple[str, Rgb]]) -> OverlayVideo:
        height, width = self._source.size
        path, source = self._folders[0].parent / f"{name}.mp4", self._source
        return OverlayVideo(path, prompts=legend, height=height, width=width, fps=source.fps, sound=source.sound)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}{BESIDE[kind]}")
