"""The Wan DiT of diffusers: built without weights, widened for direct video injection, asked for a velocity.

There is no DiT of ours: `WanTransformer3DModel(in_channels=32)` fed concat([x_t, video]) is the reference's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from torch import Tensor

LATENT_CHANNELS = 16
PATCH_KEY = "patch_embedding.weight"


class _Float32Rope(WanRotaryPosEmbed):
    """Rotary angles that follow the device, never the dtype: bfloat16 would merge neighbouring positions."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Float32Rope":
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def build_dit(config: Mapping[str, Any], *, in_channels: int) -> WanTransformer3DModel:
    """A DiT whose parameters are on the meta device, for weights to be assigned to; the rotary table is real.

    config: constructor arguments of WanTransformer3DModel; in_channels: 16, or 32 with the video injected.
    """
    with torch.device("meta"):
        dit = WanTransformer3DModel(**{**config, "in_channels": in_channels, "out_channels": LATENT_CHANNELS})
    dit.rope = _Float32Rope(dit.config.attention_head_dim, dit.config.patch_size, dit.config.rope_max_seq_len)
    return dit


def widen(weight: Tensor) -> Tensor:
    """Patch embedding [D 16 1 2 2] -> [D 32 1 2 2] for [x_t, video]: Wan's weights, then zeros for the video.

    The widened model starts out equal to the plain one; the bias stays as it is.
    """
    return torch.cat([weight, torch.zeros_like(weight)], dim=1)


def velocity(
    dit: WanTransformer3DModel, *, x_t: Tensor, video_latent: Tensor, timestep: Tensor, text: Tensor
) -> Tensor:
    """Velocity that the DiT predicts at a point of the path.

    x_t [B 16 f h w]    video_latent [B 16 f h w] norm, injected only if the DiT takes 32 channels
    timestep [B] 1..1000, int64 or float32 (never bfloat16, which has no 437)    text [B L D] zero padded
    returns float32 [B 16 f h w] velocity, whatever the dtype of the weights
    """
    dtype = dit.patch_embedding.weight.dtype
    injected = dit.patch_embedding.in_channels > x_t.shape[1]
    hidden = torch.cat([x_t, video_latent], dim=1) if injected else x_t
    out = dit(
        hidden_states=hidden.to(dtype),
        timestep=timestep,
        encoder_hidden_states=text.to(dtype),
        return_dict=False,
    )
    return out[0].float()
