"""The mask decoder: the Wan VAE's decoder with one output channel, without the clamp that kills gradients.

Owns the frame-by-frame decode and the focal and dice losses on its logits. Holds only `decoder.*` and
`post_quant_conv.*`, under diffusers' names, so that it trains alone under any engine.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmask.models.strict import load_strict

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


class MaskDecoder(nn.Module):
    """Raw mask latent to one logit a pixel."""

    def __init__(self, decoder: Any, post_quant_conv: Any) -> None:
        super().__init__()
        self.decoder = decoder
        self.post_quant_conv = post_quant_conv
        causal = type(decoder.conv_in)
        self._cached_convs = sum(isinstance(m, causal) for m in decoder.modules())

    @classmethod
    def from_vae(cls, vae: "AutoencoderKLWan") -> "MaskDecoder":
        """The VAE's own decoder with its last convolution averaged over RGB: a copy, trainable.

        A mask is encoded as three equal channels, so this already decodes masks; training starts from it, and
        `mask_decoder: vae` is it.
        """
        made = cls(copy.deepcopy(vae.decoder), copy.deepcopy(vae.post_quant_conv))
        last: Any = made.decoder.conv_out
        last.weight = nn.Parameter(last.weight.detach().mean(0, keepdim=True))
        last.bias = nn.Parameter(last.bias.detach().mean(0, keepdim=True))
        last.out_channels = 1
        return made.requires_grad_(True)

    def load(self, state: Mapping[str, Tensor], *, where: object) -> "MaskDecoder":
        """Copy weights in, strictly; keys `decoder.*` and `post_quant_conv.*`. Raises WeightsError."""
        load_strict(self, state, where=where, fix="Use a decoder made for this VAE (model.mask_decoder)")
        return self

    def forward(self, mask_latent: Tensor) -> Tensor:
        """Decode one latent frame at a time, as the causal convolutions expect; gradients reach every frame.

        mask_latent: [B 16 f h w] raw    returns: float32 [B 1 F H W] logits, unclamped; F = 4f - 3
        """
        hidden = self.post_quant_conv(mask_latent.to(self.post_quant_conv.weight.dtype))
        cache: list[Any] = [None] * self._cached_convs
        frames = [
            self.decoder(hidden[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=i == 0)
            for i in range(hidden.shape[2])
        ]
        return torch.cat(frames, dim=2).float()


def focal_loss(logits: Tensor, target: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss, mean over all elements (Lin et al. 2017): easy pixels hardly count.

    logits: [B 1 F H W]    target: bool or 0/1 of the same shape    alpha: weight of the mask's pixels
    """
    target = target.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    miss = torch.exp(-cross_entropy)
    balance = alpha * target + (1 - alpha) * (1 - target)
    return (balance * (1 - miss) ** gamma * cross_entropy).mean()


def dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    """1 - soft Dice overlap of each clip, mean over the batch; `smooth` pixels make empty-on-empty a 0.

    logits: [B 1 F H W]    target: bool or 0/1 of the same shape
    """
    prob, target = logits.sigmoid().flatten(1), target.to(logits.dtype).flatten(1)
    overlap = 2 * (prob * target).sum(1) + smooth
    return (1 - overlap / (prob.sum(1) + target.sum(1) + smooth)).mean()
