"""Where the masks of one sentence are while its video is scored: in files that stay, or in memory."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flowmask.trainer.predict.overlay import read_mask, write_mask
from flowmask.trainer.score.metrics.base import Mask


class MaskPlace(Protocol):
    """Keeps a mask bool [H W] for each frame's name."""

    def write(self, frame: str, mask: Mask) -> None: ...

    def read(self, frame: str) -> Mask: ...


class MaskFiles:
    """<folder>/<frame>.png; the folder is there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, frame: str, mask: Mask) -> None:
        write_mask(self._folder / f"{frame}.png", mask)

    def read(self, frame: str) -> Mask:
        return read_mask(self._folder / f"{frame}.png")


class MaskMemory:
    """A bit for each pixel."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], NDArray[np.uint8]]] = {}

    def write(self, frame: str, mask: Mask) -> None:
        self._known[frame] = mask.shape, np.packbits(mask)

    def read(self, frame: str) -> Mask:
        shape, bits = self._known[frame]
        return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(np.bool_)
