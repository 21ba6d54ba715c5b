"""The frozen Wan VAE: pixels to raw posterior moments and back, and the statistics that normalise a video latent.

The video's latent is normalised, the mask's never is: the two tensors have one shape and two meanings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isclose
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowmask.models.device import to_device
from flowmask.models.flow import LOGVAR_RANGE

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


@dataclass(frozen=True)
class LatentStats:
    """Per-channel mean and deviation of raw video latents, from a VAE's config or a cache's manifest."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, vae: "AutoencoderKLWan") -> "LatentStats":
        config: Any = vae.config
        return cls.from_lists(config.latents_mean, config.latents_std)

    @classmethod
    def from_lists(cls, mean: Sequence[float], std: Sequence[float]) -> "LatentStats":
        return cls(tuple(map(float, mean)), tuple(map(float, std)))

    def close_to(self, other: "LatentStats") -> bool:
        """Whether both belong to the same VAE."""
        ours, theirs = (*self.mean, *self.std), (*other.mean, *other.std)
        return len(ours) == len(theirs) and all(map(partial(isclose, rel_tol=1e-5, abs_tol=1e-6), ours, theirs))

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # made on the host: `torch.tensor(..., device=cuda)` waits for all queued work of the GPU
        columns = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (self.mean, self.std))
        mean, std = (to_device(column, like.device) for column in columns)
        return mean, std


def normalise(stats: LatentStats, raw: Tensor) -> Tensor:
    """raw [B 16 f h w] -> norm, float32. Normalise after sampling; a logvar is never normalised."""
    mean, std = stats._columns(raw)
    return (raw.float() - mean) / std


def denormalise(stats: LatentStats, norm: Tensor) -> Tensor:
    """norm [B 16 f h w] -> raw, float32; the inverse of `normalise`."""
    mean, std = stats._columns(norm)
    return norm.float() * std + mean


@torch.no_grad()
def encode_moments(vae: "AutoencoderKLWan", signed: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior of a clip.

    signed:  [B 3 F H W] in -1..1, F = 4k+1, H and W multiples of 8
    returns: mean, logvar (clamped to -30..20), float32 [B 16 f h w] raw
    """
    assert signed.shape[2] % 4 == 1, f"{signed.shape[2]} frames; the VAE takes 4k+1"
    return encode_pieces(vae, latent_frames(signed))


def latent_frames(signed: Tensor) -> tuple[Tensor, ...]:
    """signed [B 3 F H W], F = 4k+1 -> the pixels of each latent frame: [B 3 1 H W], then [B 3 4 H W] each."""
    return signed.split([1] + [4] * (signed.shape[2] // 4), dim=2)


@torch.no_grad()
def encode_pieces(vae: "AutoencoderKLWan", pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Posterior of a clip whose pixels arrive one latent frame at a time, on any device, to save memory.

    The causal convolutions keep the needed state of earlier frames, so the result equals `vae.encode` bit for bit.

    pieces:  as from `latent_frames`, in -1..1; H and W multiples of 8
    returns: mean, logvar (clamped to -30..20), float32 [B 16 f h w] raw
    """
    encoder: Any = vae.encoder
    causal = type(encoder.conv_in)
    cache: list[Any] = [None] * sum(isinstance(module, causal) for module in encoder.modules())
    sent = (to_device(piece, vae.device).to(vae.dtype) for piece in pieces)
    frames = [encoder(piece, feat_cache=cache, feat_idx=[0]) for piece in sent]
    mean, logvar = vae.quant_conv(torch.cat(frames, dim=2)).float().chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def encode_mask(vae: "AutoencoderKLWan", mask: Tensor) -> Tensor:
    """Encode a binary mask like a black and white video.

    mask:    bool [B F H W]           union of the objects of the sentence
    returns: float32 [B 16 f h w] raw   posterior mean; not normalised, unlike the video's
    """
    return encode_moments(vae, mask_to_signed(mask))[0]


@torch.no_grad()
def decode(vae: "AutoencoderKLWan", latent: Tensor) -> Tensor:
    """Decode a latent of a video, or of a mask that was encoded as a video.

    latent:  [B 16 f h w] raw
    returns: float32 [B 3 F H W] in -1..1, F = 4f - 3
    """
    decoded: Tensor = vae.decode(latent.to(vae.device, vae.dtype)).sample
    return decoded.float()


def mask_to_signed(mask: Tensor) -> Tensor:
    """bool [B F H W] -> float32 [B 3 F H W]: 2m - 1 in three equal channels."""
    signed = mask.float() * 2 - 1
    return signed.unsqueeze(1).expand(-1, 3, -1, -1, -1)
