"""Frames of a video as the VAE's clip for segmentation: their size, their number and their pixels.

Frames are read a few at a time, and the clip is kept in 8 bits at its small size. The VAE's float32 input needs four
times the memory, so it is made for one latent frame at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.clip.pixels import PixelNorm, eval_size, missing_to_stride, resize_frame, to_signed
from flowmask.data_pipeline.config import FrameBox

FRAMES_AT_ONCE = 16
T = TypeVar("T")


def chunks(items: Sequence[T], length: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of at most `length`."""
    return (items[start : start + length] for start in range(0, len(items), length))


class FrameReader(Protocol):
    """The source of a clip's frames: a dataset's video, a video file or a folder of frames."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px."""

    def frames(self, ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        """rgb8 [H W 3] of each id."""


@dataclass(frozen=True)
class VaeClip:
    """Frames at the VAE's size, in 8 bits: a quarter of the memory of float32.

    rgb8: uint8 [F H W 3], F = 4k+1: the last of `frames` repeated; H x W is `size` (width, height)
    original: (width, height) of the video
    """

    rgb8: NDArray[np.uint8]
    frames: int
    size: tuple[int, int]
    original: tuple[int, int]
    pixel_norm: PixelNorm

    def pieces(self) -> Iterator[Tensor]:
        """The pixels of each latent frame, signed: float32 [1 3 1 H W], then [1 3 4 H W] each."""
        for stop in range(1, len(self.rgb8) + 1, 4):
            some = self.rgb8[max(stop - 4, 0) : stop]
            yield to_signed(list(some), pixel_norm=self.pixel_norm)[None].contiguous()

    def without_pixels(self) -> "VaeClip":
        """The same clip without its frames: the sizes for resizing masks."""
        return replace(self, rgb8=np.empty(0, np.uint8))


def read_clip(
    video: FrameReader,
    ids: Sequence[int],
    *,
    box: FrameBox,
    pixel_norm: PixelNorm,
    known: NDArray[np.uint8] | None = None,
) -> VaeClip:
    """The frames `ids` of a video as one clip: the largest size inside the box, floored to its multiple.

    known: uint8 [n H W 3]: the clip's first n frames, which are not read again
    """
    height, width = video.size
    size = eval_size(width, height, height=box.height_px, width=box.width_px, multiple=box.size_multiple)
    rgb8 = np.empty((len(ids) + missing_to_stride(len(ids)), *reversed(size), 3), np.uint8)
    done = 0
    if known is not None:
        done = len(known)
        rgb8[:done] = known
    for places in chunks(range(done, len(ids)), FRAMES_AT_ONCE):
        for place, frame in zip(places, video.frames([ids[place] for place in places])):
            rgb8[place] = resize_frame(frame, size=size)
    rgb8[len(ids) :] = rgb8[len(ids) - 1]
    return VaeClip(rgb8, len(ids), size, (width, height), pixel_norm)
