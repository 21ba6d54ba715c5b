"""The mask decoder: the Wan VAE's decoder with one output channel, without the clamp that removes gradients.

Has the frame-by-frame decode, its recomputation to save memory, and the focal and dice losses on its
logits. Holds only `decoder.*` and `post_quant_conv.*`, under diffusers' names, so that it trains alone.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flowmask.models.config import Recompute
from flowmask.models.strict import load_strict

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


class MaskDecoder(nn.Module):
    """Raw mask latent to one logit per pixel."""

    def __init__(self, decoder: Any, post_quant_conv: Any) -> None:
        super().__init__()
        self.decoder = decoder
        self.post_quant_conv = post_quant_conv
        causal = type(decoder.conv_in)
        self._cached_convs = sum(isinstance(m, causal) for m in decoder.modules())
        self._frame_again = False

    @classmethod
    def from_vae(cls, vae: "AutoencoderKLWan") -> "MaskDecoder":
        """The VAE's own decoder with its last convolution averaged over RGB: a copy, trainable.

        A mask is encoded as three equal channels, so this already decodes masks. Training starts from it, and
        `mask_decoder: vae` uses it.
        """
        made = cls(copy.deepcopy(vae.decoder), copy.deepcopy(vae.post_quant_conv))
        last: Any = made.decoder.conv_out
        last.weight = nn.Parameter(last.weight.detach().mean(0, keepdim=True))
        last.bias = nn.Parameter(last.bias.detach().mean(0, keepdim=True))
        last.out_channels = 1
        return made.requires_grad_(True)

    def load(self, state: Mapping[str, Tensor], *, where: object) -> "MaskDecoder":
        """Copy weights in: `decoder.*` and `post_quant_conv.*`, of the module's shapes; WeightsError unless all fit."""
        load_strict(self, state, where=where, fix="Use a decoder made for this VAE (model.mask_decoder)")
        return self

    def recompute(self, kind: Recompute) -> None:
        """Drop activations in the forward pass and recompute them in the backward pass; losses are bit-identical.

        selective: each block keeps the results of convolutions and attention, so no product is computed twice. full: a
        latent frame keeps the state for the next one; during its recomputation each block keeps only its input.
        """
        if kind == "none":
            return
        self._frame_again = kind == "full"
        save: dict[str, Any] = {}
        if kind == "selective":
            save["context_fn"] = partial(create_selective_checkpoint_contexts, _what_to_keep)
        decoder = self.decoder
        blocks = [*decoder.mid_block.resnets, *decoder.mid_block.attentions, decoder.norm_out]
        for up in decoder.up_blocks:
            blocks += [*up.resnets, *(up.upsamplers or ())]
        for block in blocks:
            block.forward = partial(_again, block.forward, slots=2, **save)  # a residual block has two caches

    def forward(self, mask_latent: Tensor) -> Tensor:
        """Decode one latent frame at a time, as the causal convolutions expect; gradients reach every frame.

        mask_latent: [B 16 f h w] raw    returns: float32 [B 1 F H W] logits, unclamped; F = 4f - 3
        """
        hidden = self.post_quant_conv(mask_latent.to(self.post_quant_conv.weight.dtype))
        cache: list[Any] = [None] * self._cached_convs
        frames = []
        for i in range(hidden.shape[2]):
            decode = partial(self.decoder, first_chunk=i == 0)
            if self._frame_again and torch.is_grad_enabled():
                decode = partial(_again, decode)
            frames.append(decode(hidden[:, :, i : i + 1], feat_cache=cache, feat_idx=[0]))
        return torch.cat(frames, dim=2).float()


def _again(
    run: Callable[..., Tensor],
    x: Tensor,
    feat_cache: list[Any] | None = None,
    feat_idx: list[int] | None = None,
    *,
    slots: int | None = None,
    **save: Any,
) -> Tensor:
    """The result of `run`, recomputed in the backward pass; save: the policy of kept results, for `checkpoint`.

    feat_cache, feat_idx: the state of earlier frames in diffusers' causal layers, and the index of the next layer.
    `run` changes them, so each of its two runs gets a copy of at most `slots` entries. If `once` held the list itself,
    a reference cycle would keep its tensors alive.
    """
    start = 0 if feat_idx is None else feat_idx[0]
    own = None if feat_cache is None else slice(start, None if slots is None else start + slots)
    cached = own is not None

    def once(x: Tensor, *before: Any) -> tuple[Any, ...]:
        if not cached:
            return run(x), 0
        cache, place = list(before), [0]
        return run(x, feat_cache=cache, feat_idx=place), place[0], *cache

    before = () if feat_cache is None or own is None else feat_cache[own]
    found, used, *cache = checkpoint(once, x, *before, use_reentrant=False, preserve_rng_state=False, **save)
    if feat_cache is not None and own is not None and feat_idx is not None:
        feat_cache[own] = cache
        feat_idx[0] += used
    return found


def _what_to_keep(context: Any, op: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    product = op is torch.ops.aten.convolution.default or "scaled_dot_product" in op.__name__
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE


def focal_loss(logits: Tensor, target: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss, mean over all elements (Lin et al. 2017): easy pixels have little weight.

    logits: [B 1 F H W]    target: bool or 0/1 of the same shape    alpha: weight of the mask's pixels
    returns: scalar
    """
    target = target.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    miss = torch.exp(-cross_entropy)
    balance = alpha * target + (1 - alpha) * (1 - target)
    return (balance * (1 - miss) ** gamma * cross_entropy).mean()


def dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    """1 - soft Dice overlap of each clip, mean over the batch (Milletari et al. 2016).

    logits: [B 1 F H W]    target: bool or 0/1 of the same shape    smooth: in px; gives 0 if both are empty
    returns: scalar
    """
    prob, target = logits.sigmoid().flatten(1), target.to(logits.dtype).flatten(1)
    overlap = 2 * (prob * target).sum(1) + smooth
    return (1 - overlap / (prob.sum(1) + target.sum(1) + smooth)).mean()
