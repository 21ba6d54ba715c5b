"""The mask decoder and the VAE around it: moments of masks and videos, logits, forward, thresholded masks."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmask.models.flow import sample_posterior
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.segment import masks_at, resize_logits
from flowmask.models.vae import encode_moments, mask_to_signed
from parity.core import Check, ParitySet, names_are, near, same, unpack

TOLERANCE = {"abs": 2e-5, "rel": 1e-4}
INPUTS = ("mask", "eps", "video_uint8")
EXPECTED = (
    "mask_latent_mean",
    "mask_latent_logvar",
    "logits",
    "logits_unclamped",
    "forward_logits_unclamped",
    "video_latent_mean",
    "video_latent_logvar",
    "resized_logits",
)


def recorded_vae(data: ParitySet) -> tuple[Any, MaskDecoder]:
    """The recorded wrapper as two parts: a VAE with its encoder, and the one-channel decoder."""
    from diffusers import AutoencoderKLWan

    weights = data.tensors("mask_decoder/weights.safetensors")
    assert all(name.startswith("vae.") for name in weights), "a key outside `vae.`"
    state = {name.removeprefix("vae."): tensor for name, tensor in weights.items()}
    vae = AutoencoderKLWan(**data.record("mask_decoder/config.json"))
    parts = ("decoder.", "post_quant_conv.")
    own = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    decoder = MaskDecoder.from_vae(vae).load(own, where="parity set")
    for part, module in (("encoder", vae.encoder), ("quant_conv", vae.quant_conv)):
        own = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        module.load_state_dict(own)
    return vae.eval(), decoder.eval()


@torch.no_grad()
def _ours(data: ParitySet) -> dict[str, Tensor]:
    io = data.tensors("mask_decoder/io.safetensors")
    vae, decoder = recorded_vae(data)
    mean, logvar = encode_moments(vae, mask_to_signed(io["mask"][None].bool()))
    video_mean, video_logvar = encode_moments(vae, io["video_uint8"].float() / 127.5 - 1)
    logits = decoder(mean)
    size = (io["resized_logits"].shape[-1], io["resized_logits"].shape[-2])
    return {
        "mask_latent_mean": mean,
        "mask_latent_logvar": logvar,
        "logits_unclamped": logits,
        "logits": logits.clamp(-1, 1),
        "forward_logits_unclamped": decoder(sample_posterior(mean, logvar, io["eps"])),
        "video_latent_mean": video_mean,
        "video_latent_logvar": video_logvar,
        "resized_logits": resize_logits(logits[0, 0], size=size)[:, None],
        "binary": masks_at(logits[0, 0], frames=logits.shape[2], size=size),
    }


def decoder_checks(data: ParitySet) -> Iterator[Check]:
    io = data.tensors("mask_decoder/io.safetensors")
    data.record("mask_decoder/config.json"), data.tensors("mask_decoder/weights.safetensors")
    ours = functools.cache(lambda: _ours(data))

    def binary() -> None:
        want = unpack(io["binary"], io["resized_logits"].shape[-1])
        certain = ours()["resized_logits"][:, 0].abs().numpy() > 1e-4
        got = ours()["binary"].numpy()
        same(np.where(certain, got, want), want)

    def binary_of_record() -> None:
        """Uses none of our code: the recorded mask equals recorded logits > 0."""
        recorded = io["resized_logits"][:, 0].numpy()
        want = unpack(io["binary"], recorded.shape[-1])
        same(np.where(np.abs(recorded) > 1e-6, recorded > 0, want), want)

    yield from names_are(io, (*INPUTS, *EXPECTED, "binary"))
    for name in EXPECTED:
        yield Check(name, lambda name=name: near(ours()[name], io[name], **TOLERANCE))
    yield Check("binary", binary)
    yield Check("binary of the recorded logits", binary_of_record)
