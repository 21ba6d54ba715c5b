"""Overlay videos of an evaluation's report: one mp4 an expression, its predicted mask over every frame."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from flowmask.data_pipeline.sources.base import Video
from flowmask.trainer.predict.overlay import OverlayVideo, colour, read_mask

OVERLAYS = "overlays"
_FPS = 10.0  # datasets of frames do not say theirs
_FRAMES_AT_ONCE = 16


def write_overlays(out: Path, keys: Sequence[str], *, videos: Sequence[Video], masks: Path) -> Path:
    """Write out/overlays/<video>_<expression>.mp4 for the expressions `keys` in place of older ones.

    keys: `<video>/<expression>`; masks: the published folder of PNGs. Returns the folder of the videos.
    """
    folder = out / OVERLAYS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    expressions = {f"{video.video_id}/{e.exp_id}": (video, e.text) for video in videos for e in video.expressions}
    for key in keys:
        video, text = expressions[key]
        _write(folder / f"{key.replace('/', '_')}.mp4", video, text=text, masks=masks / key)
    return folder


def _write(path: Path, video: Video, *, text: str, masks: Path) -> None:
    names = video.frame_names
    height, width = read_mask(masks / f"{names[0]}.png").shape
    with OverlayVideo(path, prompts=[(text, colour(0))], height=height, width=width, fps=_FPS) as overlay:
        for first in range(0, len(names), _FRAMES_AT_ONCE):
            ids = range(first, min(first + _FRAMES_AT_ONCE, len(names)))
            for i, frame in zip(ids, video.frames(ids), strict=True):
                overlay.add(frame, [read_mask(masks / f"{names[i]}.png")])
