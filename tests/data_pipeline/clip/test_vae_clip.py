"""A clip of a video: its pieces equal the signed pixels of the whole, and memory holds only the resized frames."""

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from trials import SEED

from flowmask.data_pipeline.clip.pixels import PixelNorm, pad_to_stride, resize_frame, to_signed
from flowmask.data_pipeline.clip.vae_clip import FRAMES_AT_ONCE, read_clip
from flowmask.data_pipeline.config import FrameBox
from flowmask.models.vae import latent_frames

BOX = FrameBox(height_px=32, width_px=48)


class Film:
    """Frames of noise."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def frames(self, ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        return [np.random.default_rng(SEED + i).integers(0, 255, (*self.size, 3), np.uint8) for i in ids]


@pytest.mark.parametrize("pixel_norm", ["half", "imagenet"])
@pytest.mark.parametrize("frames", [1, 2, 4, 5, 9, 12, 37])
def test_its_pieces_are_the_signed_pixels_of_the_whole_to_the_bit(frames: int, pixel_norm: PixelNorm) -> None:
    film, ids = Film((40, 70)), range(3, 3 + frames)
    clip = read_clip(film, ids, box=BOX, pixel_norm=pixel_norm)
    small = [resize_frame(frame, size=clip.size) for frame in film.frames(ids)]
    whole = latent_frames(pad_to_stride(to_signed(small, pixel_norm=pixel_norm), dim=1)[None])
    pieces = list(clip.pieces())
    assert [piece.shape for piece in pieces] == [piece.shape for piece in whole] and clip.frames == frames
    assert all(piece.is_contiguous() and torch.equal(piece, want) for piece, want in zip(pieces, whole))
    assert not len(clip.without_pixels().rgb8) and clip.without_pixels().size == clip.size == (48, 16)


def test_while_a_clip_is_read_memory_holds_it_once_and_a_few_large_frames() -> None:
    film, frames, large = Film((320, 480)), 120, 3 * 320 * 480
    tracemalloc.start()
    clip = read_clip(film, range(frames), box=FrameBox(height_px=160, width_px=240), pixel_norm="half")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert clip.rgb8.nbytes == 121 * 3 * 160 * 240
    assert most < clip.rgb8.nbytes + (2 * FRAMES_AT_ONCE + 4) * large
