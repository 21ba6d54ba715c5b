"""The storage of one sentence's masks during scoring, in files or in memory; the names of the files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.names import file_names
from flowmask.data_pipeline.sources.base import Video
from flowmask.trainer.predict.show.overlay import read_mask, write_mask
from flowmask.trainer.score.metrics.base import Mask


class MaskNames:
    """File names of the ids of a dataset: the ids themselves, unless a file system would confuse them."""

    def __init__(self, videos: Sequence[Video]) -> None:
        self._videos = file_names(video.video_id for video in videos)

    def video(self, video: Video) -> str:
        return self._videos[video.video_id]

    def keys(self, video: Video) -> dict[str, str]:
        """`<video>/<expression>` of each expression id: a folder below masks/, and a key of scores.json."""
        names = file_names(expression.exp_id for expression in video.expressions)
        return {exp_id: f"{self.video(video)}/{name}" for exp_id, name in names.items()}


class MaskPlace(Protocol):
    """Stores a mask bool [H W] under each frame's name."""

    def write(self, frame: str, mask: Mask) -> None:
        """Store the mask bool [H W] of a frame."""

    def read(self, frame: str) -> Mask:
        """The mask bool [H W] of a frame."""


class MaskFiles:
    """In <folder>/<frame>.png; the folder exists."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, frame: str, mask: Mask) -> None:
        """Write the mask bool [H W] of a frame."""
        write_mask(self._folder / f"{frame}.png", mask)

    def read(self, frame: str) -> Mask:
        """Read the mask bool [H W] of a frame."""
        return read_mask(self._folder / f"{frame}.png")


class MaskMemory:
    """One bit for each pixel."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], NDArray[np.uint8]]] = {}

    def write(self, frame: str, mask: Mask) -> None:
        """Store the mask bool [H W] of a frame, one bit per pixel."""
        self._known[frame] = mask.shape, np.packbits(mask)

    def read(self, frame: str) -> Mask:
        """Mask bool [H W] of a frame."""
        shape, bits = self._known[frame]
        return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(np.bool_)
