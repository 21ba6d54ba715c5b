"""Cost of the frozen encoders: FLOPs and device memory of the VAE and UMT5, from dry passes of the real modules."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from flowmask.launch.plan.memory import CONTEXT_BYTES, FRAGMENTATION
from flowmask.launch.plan.model import Architecture, parameters
from flowmask.launch.plan.one_pass import Shape
from flowmask.models.config import LightDecoderConfig
from flowmask.models.cost.dry_run import Pass, dry_pass
from flowmask.models.decoders.either import empty_light
from flowmask.models.dit import LATENT_CHANNELS, velocity
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.vae import encode_moments

BYTES = {"float32": 4, "bfloat16": 2}
_TF32, _FP32 = 1 / 2, 1 / 16  # of the bf16 peak, from an A100's data sheet


def share_of_peak(dtype: str, *, tf32: bool | None, products: bool) -> float:
    """Share of the bf16 peak that a GPU reaches in matrix products or in convolutions; tf32: as in job configs."""
    if dtype != "float32":
        return 1.0
    allowed = bool(tf32) if products else tf32 is not False
    return _TF32 if allowed else _FP32


@dataclass(frozen=True, eq=False)
class Encoders:
    """The frozen parts of one Wan."""

    shapes: Architecture

    @lru_cache  # noqa: B019 - lives as long as a plan
    def encode(self, shape: Shape, *, dtype: str, clips: int = 1) -> Pass:
        """The VAE's encoder over `clips` clips, with its pixels."""

        def run(vae: Any) -> Tensor:
            return encode_moments(vae, torch.zeros(clips, 3, shape.frames, shape.height, shape.width))[0]

        return dry_pass(self.shapes.vae(), run, dtype=getattr(torch, dtype), backward=False)

    @lru_cache  # noqa: B019
    def embed(self, *, sentences: int, tokens: int, dtype: str) -> Pass:
        """UMT5 over sentences with equal numbers of tokens."""

        def run(encoder: Any) -> Tensor:
            found: Tensor = encoder(input_ids=torch.zeros(sentences, tokens, dtype=torch.long)).last_hidden_state
            return found

        return dry_pass(self.shapes.text_encoder(), run, dtype=getattr(torch, dtype), backward=False)

    @lru_cache  # noqa: B019
    def decode(
        self, shape: Shape, *, dtype: str = "float32", masks: int = 1, light: LightDecoderConfig | None = None
    ) -> Pass:
        """The mask decoder over several masks of one clip; light: size of a light decoder that replaces the VAE's."""

        def run(decoder: nn.Module) -> Tensor:
            found: Tensor = decoder(torch.zeros(masks, LATENT_CHANNELS, *shape.latent))
            return found

        decoder = MaskDecoder.from_vae(self.shapes.vae()) if light is None else empty_light(light)
        return dry_pass(decoder, run, dtype=getattr(torch, dtype), backward=False)

    @lru_cache  # noqa: B019
    def dit(self, shape: Shape, *, sentences: int, text_tokens: int, dtype: torch.dtype) -> Pass:
        """One step of the DiT for several sentences of one video."""
        latent = (sentences, LATENT_CHANNELS, *shape.latent)
        depth = self.shapes.dit_config["num_layers"]

        def run(dit: Any) -> Tensor:
            text = torch.zeros(sentences, text_tokens, self.shapes.dit_config["text_dim"])
            step = torch.full((sentences,), 1000)
            video = torch.zeros(latent)
            return velocity(dit, x_t=torch.zeros(latent), video_latent=video, timestep=step, text=text)

        few, more = (
            dry_pass(self.shapes.dit(video_injection=True, layers=n), run, dtype=dtype, backward=False) for n in (1, 2)
        )
        return few.extended(more, depth - 1)

    def share_of_vae(self, shape: Shape, light: LightDecoderConfig) -> float:
        """FLOPs of a light mask decoder as a share of those of the VAE's."""
        return self.decode(shape, light=light).flop / self.decode(shape).flop

    def pixel_flop(self, shape: Shape) -> float:
        """FLOPs of the VAE's encoder per pixel, for clips of this length; nearly independent of their size."""
        return self.encode(shape, dtype="float32").flop / shape.pixels

    def text_flop(self, tokens: float, *, sentences: float = 1) -> float:
        """FLOPs of UMT5 over `tokens` tokens in total: the embedding table costs nothing."""
        encoder = self.shapes.text_encoder()
        config = encoder.config
        weights = parameters(encoder) - config.vocab_size * config.d_model
        mean = tokens / max(sentences, 1)
        attention = 4 * config.num_layers * mean * config.num_heads * config.d_kv
        return tokens * (2.0 * weights + attention)

    def text_bytes(self, dtype: str) -> float:
        return parameters(self.shapes.text_encoder()) * BYTES[dtype]

    def vae_bytes(self, dtype: str) -> float:
        return parameters(self.shapes.vae()) * BYTES[dtype]

    def decoder_bytes(self, dtype: str, light: LightDecoderConfig | None) -> float:
        """Bytes of the mask decoder's weights; the VAE's decoder is loaded together with its encoder."""
        return self.vae_bytes(dtype) if light is None else parameters(empty_light(light)) * BYTES[dtype]


def with_allowances(peak: float) -> float:
    """Memory that a GPU needs for tensors of `peak` bytes."""
    return CONTEXT_BYTES + peak * (1 + FRAGMENTATION)
