"""Overlay videos of an evaluation's report: one mp4 per expression, its predicted mask over every frame."""

from collections.abc import Mapping
from pathlib import Path

from flowmask.data_pipeline.formats.names import file_names
from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.trainer.predict.show.overlay import OverlayVideo, colour, legend_text, read_mask

OVERLAYS = "overlays"
_FPS = 10.0  # datasets of frames do not state a rate


def write_overlays(out: Path, expressions: Mapping[str, tuple[Video, Expression]], *, masks: Path) -> Path:
    """Write out/overlays/<video>_<expression>.mp4 for each expression; makes `overlays`.

    expressions: by `<video>/<expression>`; if two names collide, the / becomes %2f. masks: the folder of
    their PNGs. Returns the folder of the videos.
    """
    folder = out / OVERLAYS
    folder.mkdir()
    names = file_names(expressions, spelled=lambda key: key.replace("/", "_"))
    for key, (video, expression) in expressions.items():
        _write(folder / f"{names[key]}.mp4", video, text=expression.text, masks=masks / key)
    return folder


def _write(path: Path, video: Video, *, text: str, masks: Path) -> None:
    from flowmask.data_pipeline.clip.vae_clip import FRAMES_AT_ONCE, chunks

    names = video.frame_names
    height, width = read_mask(masks / f"{names[0]}.png").shape
    said = legend_text(text, instead=legend_text(f"expression {path.stem}", instead="the sentence"))
    with OverlayVideo(path, prompts=[(said, colour(0))], height=height, width=width, fps=_FPS) as overlay:
        for ids in chunks(range(len(names)), FRAMES_AT_ONCE):
            for i, frame in zip(ids, video.frames(ids), strict=True):
                overlay.add(frame, [read_mask(masks / f"{names[i]}.png")])
