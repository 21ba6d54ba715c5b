"""The clips of a video's windows, one after another; one answer from the logits of all; the final masks of each
window.

Memory holds the pixels of one window, and of the frames that it shares with the next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.clip.pixels import PixelNorm
from flowmask.data_pipeline.clip.vae_clip import FrameReader, VaeClip, read_clip
from flowmask.data_pipeline.config import FrameBox
from flowmask.trainer.predict.inference import MaskPiece, finite, masks_of
from flowmask.trainer.predict.presence import presence_of
from flowmask.trainer.predict.windows.cut import TimeWindow


def window_clips(
    video: FrameReader, windows: Sequence[TimeWindow], *, box: FrameBox, pixel_norm: PixelNorm
) -> Iterator[tuple[TimeWindow, VaeClip]]:
    """Each window with its clip, as `read_clip` would give it; every frame is read once, in order."""
    shared: NDArray[np.uint8] | None = None
    for window in windows:
        clip = read_clip(video, window.frames, box=box, pixel_norm=pixel_norm, known=shared)
        if not window.is_last:
            shared = clip.rgb8[len(window.final) : clip.frames].copy()
        yield window, clip


class Blend:
    """The logits of one sentence, window after window; keeps those of the frames that two windows share.

    Over the shared frames the later window's weight rises linearly from 0; it reaches 1 at the first frame after
    them.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None  # of frames that are not final, on the host

    def add(self, window: TimeWindow, logits: Tensor) -> Tensor:
        """Logits [F H W] of the next window, with its padding -> those of its final frames."""
        logits = logits[: len(window.frames)]
        if self._kept is not None:
            kept = self._kept.to(logits.device)
            later = torch.arange(len(kept), device=logits.device, dtype=logits.dtype)[:, None, None] / len(kept)
            logits = torch.cat([torch.lerp(kept, logits[: len(kept)], later), logits[len(kept) :]])
        final, rest = logits.tensor_split([len(window.final)])
        self._kept = None if window.is_last else rest.to("cpu", copy=True)
        return final


class Stitched:
    """The answer to one sentence, window after window.

    presence: of the final frames so far, each weighted by its share of the whole video
    """

    def __init__(self) -> None:
        self.presence = 0.0
        self._blend = Blend()

    def add(self, window: TimeWindow, logits: Tensor) -> Tensor:
        """Logits [F H W] of the next window, with its padding -> those of its final frames, as `Blend.add`.

        CheckpointError if one of them is not finite.
        """
        final = finite(self._blend.add(window, logits))
        self.presence += window.share * presence_of(final, frames=len(final))
        return final


def final_masks(window: TimeWindow, logits: Tensor, clip: VaeClip, *, threshold: float = 0.5) -> Iterator[MaskPiece]:
    """Logits [n H W] of a window's final frames -> masks at the video's size, with their places in the video.

    threshold: `masks_at`
    """
    for places, masks in masks_of(logits, final_part(window, clip), threshold=threshold):
        yield window.final[places[0] : places[-1] + 1], masks


def final_part(window: TimeWindow, clip: VaeClip) -> VaeClip:
    """The sizes of a window's final frames."""
    return replace(clip.without_pixels(), frames=len(window.final))
