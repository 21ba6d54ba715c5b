"""The light mask decoder: a few causal convolutions on the latent grid, then a linear layer for each position.

A position of latent frame 0 becomes 8x8 pixels of frame 0, one of latent frame i those of frames 4i-3..4i. In each of
these frames its logits are one number, enlarged bilinearly, plus 64 fine ones: edges are smooth from the start.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmask.models.config import LightDecoderConfig
from flowmask.models.device import seeded
from flowmask.models.dit import LATENT_CHANNELS

SETTING = "light_decoder"  # key for its size in runs and exports
_PATCH, _FRAMES = 8, 4  # per latent position: pixels per side, frames
_NUMBERS = 1 + _PATCH**2  # per position and frame: the coarse value and the fine ones


class LightMaskDecoder(nn.Module):
    """Raw mask latent to one logit per pixel."""

    def __init__(self, network: LightDecoderConfig) -> None:
        super().__init__()
        self.network, width = network, network.width
        self.stem = _CausalConv(LATENT_CHANNELS, width)
        self.blocks = nn.ModuleList(_Residual(width) for _ in range(network.depth))
        self.first = nn.Linear(width, _NUMBERS)
        self.later = nn.Linear(width, _FRAMES * _NUMBERS)

    @classmethod
    def fresh(cls, network: LightDecoderConfig) -> "LightMaskDecoder":
        """A decoder with initial weights, which are equal in every process; logits are near 0.

        At first each frame is decoded without earlier frames. Training on short clips never trains weights for frames
        that they lack, so these weights stay zero and do no harm in longer clips.
        """
        with seeded(0):
            made = cls(network)
            for head in (made.first, made.later):
                nn.init.normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)
            for part in made.modules():
                if isinstance(part, _CausalConv):
                    nn.init.zeros_(part.weight[:, :, :-1])
        return made

    def forward(self, mask_latent: Tensor) -> Tensor:
        """Decode all latent frames at once; no frame depends on a later one.

        mask_latent: [B 16 f h w] raw    returns: float32 [B 1 F H W] logits, unclamped; F = 4f - 3
        """
        hidden = self.stem(mask_latent.to(self.stem.weight.dtype))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = F.silu(hidden).movedim(1, -1)  # [B f h w width]
        numbers = torch.cat([_by_frame(self.first(hidden[:, :1])), _by_frame(self.later(hidden[:, 1:]))], dim=1)
        coarse, fine = numbers.float().split([1, _PATCH**2], dim=2)
        smooth = F.interpolate(coarse.squeeze(2), scale_factor=_PATCH, mode="bilinear", align_corners=False)
        return (F.pixel_shuffle(fine, _PATCH).squeeze(2) + smooth).unsqueeze(1)


def _by_frame(numbers: Tensor) -> Tensor:
    """[B f h w n*65] -> [B f*n 65 h w]."""
    return numbers.unflatten(-1, (-1, _NUMBERS)).permute(0, 1, 4, 5, 2, 3).flatten(1, 2)


class _CausalConv(nn.Conv3d):
    """3x3x3 over a frame and the two before it, with zero padding."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1, 2, 0)))


class _Residual(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = _CausalConv(width, width), _CausalConv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        added: Any = self.outer(F.silu(self.inner(F.silu(x))))
        return x + added
