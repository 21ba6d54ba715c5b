"""Recognises a mask decoder from the names and shapes of its weights, not from a config, and builds the module."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from flowmask.models.config import LightDecoderConfig
from flowmask.models.decoders.light import LightMaskDecoder
from flowmask.models.errors import WeightsError
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.strict import assign_strict

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

_STEM = "stem.weight"  # no VAE has this name
_BLOCK = re.compile(r"blocks\.\d+\.inner\.weight")


def network_of(state: Mapping[str, Tensor], *, where: object) -> LightDecoderConfig | None:
    """The size of a light decoder, from its weights; None if they are not a light decoder's.

    state: by name, of any shape; WeightsError if no light decoder has such a width or depth
    """
    if _STEM not in state:
        return None
    width, depth = state[_STEM].shape[:1], sum(map(bool, map(_BLOCK.fullmatch, state)))
    try:
        return LightDecoderConfig(width=width[0] if width else 0, depth=depth)
    except ValidationError:
        raise WeightsError(f"{where} is not a light mask decoder: width {tuple(width)}, depth {depth}") from None


def empty_light(network: LightDecoderConfig) -> LightMaskDecoder:
    """A light decoder on the meta device, to assign weights, or for plans."""
    with torch.device("meta"):
        return LightMaskDecoder(network)


def decoder_of(state: Mapping[str, Tensor], vae: "AutoencoderKLWan", *, where: object) -> nn.Module:
    """The decoder of these weights; WeightsError if none fits.

    state: by name, of the decoder's shapes: the light one, or that of `vae` with one output channel
    """
    network = network_of(state, where=where)
    if network is None:
        return MaskDecoder.from_vae(vae).load(state, where=where)
    light = empty_light(network)
    assign_strict(light, state, where=where, fix="Use a decoder that FlowMask trained (model.mask_decoder)")
    return light.requires_grad_(True)


def refuse_other_decoder(state: Mapping[str, Tensor], module: nn.Module, *, where: object) -> None:
    """Raises WeightsError unless the weights, by name and of any shape, belong to the decoder `module`.

    That is the VAE's, or the light one of the same size.
    """
    found, wanted = network_of(state, where=where), network_of(module.state_dict(), where=where)
    if found != wanted:
        raise WeightsError(f"{where} is {_said(found)}, but {_said(wanted)} is trained; set {_keys(found)}")


def _said(network: LightDecoderConfig | None) -> str:
    if network is None:
        return "a decoder of the VAE's shape"
    return f"a light decoder of width {network.width} and depth {network.depth}"


def _keys(network: LightDecoderConfig | None) -> str:
    if network is None:
        return "objective.kind=mask_decoder"
    size = f"objective.network.width={network.width} objective.network.depth={network.depth}"
    return f"objective.kind=light_mask_decoder {size}"
