"""Synthetic scenes for the writers of a toy's datasets: one at a time, with a name and its sentences."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.sources.synthetic_scene import draw_block

FRAMES, SIZE_PX = 17, 64  # as many frames as a clip; both sides of a picture
_MOTION = ("mov", "going", "still")  # parts of words about motion, which a single picture can't show


@dataclass(frozen=True)
class Scene:
    """One scene: frames uint8 [F H W 3] rgb8, visible masks bool [K F H W] of its objects, and its sentences.

    sentences: (text, numbers of its objects); nothing: (text, kind) of those that name no object
    """

    number: int
    frames: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    sentences: tuple[tuple[str, tuple[int, ...]], ...]
    nothing: tuple[tuple[str, str], ...]

    def of_one_object(self) -> list[tuple[str, int]]:
        """The sentences that name one object that is visible in some frame."""
        return [(text, named[0]) for text, named in self.sentences if len(named) == 1 and self.masks[named[0]].any()]

    def index_maps(self) -> NDArray[np.uint8]:
        """uint8 [F H W]: 1 and more for the objects, 0 for the background."""
        numbers = np.arange(1, len(self.masks) + 1, dtype=np.uint8)[:, None, None, None]
        return np.asarray((self.masks * numbers).max(axis=0), dtype=np.uint8)

    def still(self) -> "Scene":
        """Its first frame as a picture: without the sentences about motion."""
        told = tuple(one for one in self.sentences if not _tells_motion(one[0]))
        nothing = tuple(one for one in self.nothing if not _tells_motion(one[0]))
        return Scene(self.number, self.frames[:1], self.masks[:, :1], told, nothing)


def draw_scenes(seed: int) -> Iterator[Scene]:
    """The scenes of a seed, in order: one block of them."""
    block = draw_block(seed, 0, frames=FRAMES, size=SIZE_PX, no_target=2)
    for number, frames in enumerate(block.frames):
        yield Scene(number, frames, block.masks[number], block.sentences[number], block.nothing[number])


def _tells_motion(text: str) -> bool:
    return any(part in text for part in _MOTION)
