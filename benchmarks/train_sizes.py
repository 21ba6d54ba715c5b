"""The models and caches of train_step.py: DiTs, VAEs and UMT5 encoders of random weights, and caches that fit them.

`cpu50m` is Wan's architecture at 50 M parameters. Its encoders are reduced alike, so that their share of a step is that
at full size. `wan1.3b` is Wan2.1 1.3B with its own VAE and UMT5-XXL; `tiny` is for tests.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from synthetic_cache import write_cache
from torch import Tensor, nn

from flowmask.models.cost.flops import TRAINING_PASSES, dit_forward_flop, dit_tokens
from flowmask.models.dit import build_dit
from flowmask.models.vae import encode_mask, encode_moments

TEXT_TOKENS = 256


@dataclass(frozen=True)
class Size:
    """One model and its clips; `vae`, `text`: constructor arguments of the frozen encoders."""

    dit: dict[str, Any]
    clip: tuple[int, int, int]  # frames, height, width in px
    vae: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    clips: int = 24

    @property
    def latent(self) -> tuple[int, int, int]:
        frames, height, width = self.clip
        return 1 + (frames - 1) // 4, height // 8, width // 8

    @property
    def tokens(self) -> int:
        """DiT tokens of one clip."""
        return dit_tokens(self.dit, self.latent)

    @property
    def step_flop(self) -> float:
        """Model FLOP of one example: forward and backward, without recomputation."""
        config = {**self.dit, "in_channels": 32, "out_channels": 16}
        return TRAINING_PASSES * dit_forward_flop(config, self.latent, text_tokens=TEXT_TOKENS)

    def build_dit(self) -> nn.Module:
        """The widened DiT in fp32 on the CPU; its random weights are small enough not to overflow."""
        dit = build_dit(self.dit, in_channels=32)
        source = torch.Generator().manual_seed(0)
        state = {k: torch.randn(v.shape, generator=source) * 0.02 for k, v in dit.state_dict().items()}
        dit.load_state_dict(state, assign=True)
        return dit

    def write_cache(self, folder: Path) -> None:
        """A cache of random clips of this size."""
        shape = (16, *self.latent)
        write_cache(folder, clips=self.clips, latent=shape, shape=self.clip, text_dim=self.dit["text_dim"])


class Encoders:
    """The frozen VAE and UMT5 with random weights, in bf16, and random frames, masks and words for them."""

    def __init__(self, size: Size, *, batch: int, device: torch.device):
        from diffusers import AutoencoderKLWan
        from transformers import UMT5Config, UMT5EncoderModel

        with torch.device(device):
            self.vae: Any = AutoencoderKLWan(**size.vae)
            settings = {"d_model": size.dit["text_dim"], "feed_forward_proj": "gated-gelu", **size.text}
            self.text = UMT5EncoderModel(UMT5Config(**settings))
        for model in (self.vae, self.text):
            model.to(torch.bfloat16).eval().requires_grad_(False)
        frames, height, width = size.clip
        self._video = torch.rand(batch, 3, frames, height, width, device=device) * 2 - 1
        self._mask = torch.rand(batch, frames, height, width, device=device) > 0.5
        self._words = torch.randint(5, 100, (batch, TEXT_TOKENS), device=device)

    @property
    def parameters_m(self) -> dict[str, float]:
        """Million parameters of each encoder that runs (the VAE's encoder half)."""
        models = {"vae_encoder": self.vae.encoder, "umt5": self.text}
        return {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """The tensors that a cache would hold, by their names in `Batch`."""
        mean, logvar = encode_moments(self.vae, self._video)
        text = self.text(input_ids=self._words).last_hidden_state
        return {
            "video_mean": mean,
            "video_logvar": logvar,
            "mask_mean": encode_mask(self.vae, self._mask),
            "text": text,
        }


_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
SIZES = {
    "cpu50m": Size(
        dit={**_WAN, "num_attention_heads": 4, "text_dim": 512, "ffn_dim": 2048, "num_layers": 11},
        clip=(17, 240, 416),
        vae={"base_dim": 16},
        text={"d_kv": 64, "num_heads": 8, "d_ff": 1024, "num_layers": 8, "vocab_size": 1000},
    ),
    "wan1.3b": Size(
        dit=_WAN,
        clip=(17, 480, 832),
        text={"d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24, "vocab_size": 256384},
    ),
    "tiny": Size(
        dit={**_WAN, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 24, "ffn_dim": 48}
        | {"num_layers": 2, "freq_dim": 32},
        clip=(5, 32, 48),
        vae={"base_dim": 8},
        text={"d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1, "vocab_size": 200},
    ),
}
