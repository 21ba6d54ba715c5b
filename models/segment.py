"""Pixels and a sentence to mask logits: encode each video once, sample, decode, resize to the original frames.

The caller passes pixels of a size that the DiT accepts (multiples of 16) and 4k+1 frames; this file does not resize
or pad them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmask.models.config import FlowStart, Predicted, SamplerConfig
from flowmask.models.device import to_device
from flowmask.models.dit import velocity
from flowmask.models.flow import TRAIN_TIMESTEPS, euler, start_noise, velocity_to
from flowmask.models.text import Embeds, clean, pad
from flowmask.models.vae import LatentStats, denormalise, encode_pieces, normalise

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel


# A batch needs no more memory than one sentence of a clip of 17x480x832; larger batches are not faster. Its size is a
# function of the clip, so no setting changes rounding.
_TOKENS_TOGETHER = 8192
_PIXELS_TOGETHER = 480 * 832


def sampled_together(latent: tuple[int, int, int], *, text_tokens: int) -> int:
    """Number of sentences of a video in one batch of the DiT; latent: (f, h, w) of its clip."""
    f, h, w = latent
    return max(1, _TOKENS_TOGETHER // (f * h * w // 4 + text_tokens))


def decoded_together(latent: tuple[int, int, int]) -> int:
    """Number of masks of a video in one batch of the decoder; the VAE's decodes one latent frame at a time."""
    _, h, w = latent
    return max(1, _PIXELS_TOGETHER // (64 * h * w))


@dataclass(frozen=True)
class SegmentSettings:
    """The conventions of the DiT's training, and the sampler."""

    sampler: SamplerConfig
    text_tokens: int = 256
    mask_latent_norm: Literal["none", "video"] = "none"
    lowercase: bool = True
    start: FlowStart = "video"
    predicts: Predicted = "velocity"


class Segmenter:
    """Frozen models that make masks from a video and a sentence; each keeps its own device and dtype."""

    def __init__(
        self,
        dit: "WanTransformer3DModel",
        *,
        vae: "AutoencoderKLWan",
        text_encoder: Embeds,
        mask_decoder: nn.Module,
        settings: SegmentSettings,
    ) -> None:
        self.dit = dit.eval()
        self.vae = vae.eval()
        self.text_encoder = text_encoder
        self.mask_decoder = mask_decoder.eval()
        self.settings = settings
        self.stats = LatentStats.of(vae)

    @torch.no_grad()
    def encode_video(self, pieces: Iterable[Tensor]) -> Tensor:
        """Pixels in the form of `encode_pieces` -> video latent [1 16 f h w] norm: the posterior mean."""
        mean, _ = encode_pieces(self.vae, pieces)
        return normalise(self.stats, mean)

    @torch.no_grad()
    def encode_text(self, sentence: str) -> Tensor:
        """A raw sentence -> [1 L D], cleaned, cut to the trained length and zero padded to it."""
        text = clean(sentence, lowercase=self.settings.lowercase)
        embedding = self.text_encoder(text, max_tokens=self.settings.text_tokens)
        return pad(embedding, self.settings.text_tokens)[None]

    @torch.no_grad()
    def mask_latent(self, video_latent: Tensor, text: Tensor) -> Tensor:
        """Sample a mask: the video's [1 16 f h w] norm and [1 L D] -> the mask's latent [1 16 f h w] raw."""
        where = self.dit.device
        return sample_mask(
            self.dit, video_latent=video_latent.to(where), text=text.to(where), settings=self.settings, stats=self.stats
        )

    @torch.no_grad()
    def logits(self, video_latent: Tensor, sentence: str) -> Tensor:
        """Video latent [1 16 f h w] norm and a raw sentence -> unclamped logits [F H W], with padding frames."""
        mask = self.mask_latent(video_latent, self.encode_text(sentence))
        found: Tensor = self.mask_decoder(mask)[0, 0]
        return found


def sample_mask(
    dit: "WanTransformer3DModel", *, video_latent: Tensor, text: Tensor, settings: SegmentSettings, stats: LatentStats
) -> Tensor:
    """Video latent [B 16 f h w] norm and text [B L D] to the masks' latents [B 16 f h w] raw.

    stats: of the latents, for a DiT trained on normalised mask latents
    """

    def predict(x_t: Tensor, timestep: Tensor) -> Tensor:
        found = velocity(dit, x_t=x_t, video_latent=video_latent, timestep=timestep, text=text)
        return found if settings.predicts == "velocity" else velocity_to(found, x_t, timestep / TRAIN_TIMESTEPS)

    start = video_latent
    if settings.start == "noise":
        start = to_device(start_noise(video_latent.shape[1:]), video_latent.device).expand_as(video_latent)
    mask = euler(predict, start, steps=settings.sampler.steps, shift=settings.sampler.shift)
    return denormalise(stats, mask) if settings.mask_latent_norm == "video" else mask


def masks_at(logits: Tensor, *, frames: int, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Logits [F H W] -> bool [frames H0 W0] at the original `size` (width, height): prob > threshold, in 0..1.

    A threshold other than 0.5 shifts the logits before the clamp, so that edges are equally sharp.
    """
    level = math.log(threshold / (1 - threshold))  # 0 at 0.5, which changes no bit
    return resize_logits(logits[:frames] - level, size=size) > 0


def resize_logits(logits: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Logits [F H W] -> [F H0 W0] by bilinear resizing.

    First they are clamped to -1..1, like the output of the VAE's decoder: this moves edges by a fraction of a pixel,
    and published scores include it.
    """
    width, height = size
    clamped = logits.clamp(-1, 1)[:, None]
    return F.interpolate(clamped, size=(height, width), mode="bilinear", align_corners=False)[:, 0]
