"""The modules of a plan, without weights: from the configs of the Wan folder, else from built-in shapes.

Every parameter is on the meta device. Each assumed shape is noted in one line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from flowmask.launch.jobs import TrainJob
from flowmask.models.dit import LATENT_CHANNELS, build_dit
from flowmask.models.lora import add_lora
from flowmask.models.strict import read_json
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.objectives import objective_named
from flowmask.trainer.objectives.base import Objective

_WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
BUILT_IN: dict[str, dict[str, Any]] = {
    "1.3B": {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14B": {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True)
class Architecture:
    """The shapes of one Wan2.1; `notes` name the assumed ones."""

    folder: WanFolder | None
    dit_config: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def dit(self, *, video_injection: bool, layers: int | None = None) -> nn.Module:
        """The DiT with all its blocks, or only `layers` of them."""
        channels = 2 * LATENT_CHANNELS if video_injection else LATENT_CHANNELS
        changes = {} if layers is None else {"num_layers": layers}
        dit: nn.Module = build_dit({**self.dit_config, **changes}, in_channels=channels)
        return dit

    def vae(self) -> Any:
        """The VAE; there is one Wan2.1 VAE for all sizes."""
        if self.folder is not None and (self.folder.path / "vae").is_dir():
            return self.folder.empty_vae()
        import torch
        from diffusers import AutoencoderKLWan

        with torch.device("meta"):
            return AutoencoderKLWan()

    def text_encoder(self) -> Any:
        """UMT5's encoder."""
        import torch
        from transformers import UMT5Config, UMT5EncoderModel

        config: Mapping[str, Any] = _UMT5_XXL
        if self.folder is not None and (self.folder.path / "text_encoder" / "config.json").is_file():
            config = read_json(self.folder.path / "text_encoder" / "config.json")
        with torch.device("meta"):
            return UMT5EncoderModel(UMT5Config.from_dict(dict(config)))


def architecture(wan: Path) -> Architecture:
    """The shapes of a Wan folder; if it does not exist, those of the published model that its name suggests."""
    if (wan / "transformer").is_dir():
        folder = WanFolder(wan)
        config: Any = folder.empty_transformer(video_injection=False).config
        return Architecture(folder, {k: v for k, v in dict(config).items() if not k.startswith("_")})
    size = "14B" if "14B" in wan.name.upper() else "1.3B"
    found = f"{wan} does not exist" if not wan.is_dir() else f"{wan} has no transformer/"
    partial = WanFolder(wan) if wan.is_dir() else None
    return Architecture(partial, dict(BUILT_IN[size]), [f"{found}: the published shapes of Wan2.1 {size}"])


def objective_of(job: TrainJob) -> Objective:
    """The objective of a run, without the latents' statistics, which change no shape."""
    return objective_named(job.objective, model=job.model)


def trained_module(job: TrainJob, shapes: Architecture, *, layers: int | None = None) -> nn.Module:
    """The module of a run at its start, on the meta device, with its frozen parts; raises the errors of the run."""
    module = objective_of(job).blueprint(shapes, layers=layers).train().requires_grad_(True)
    if job.lora is not None:
        add_lora(module, job.lora, seed=job.train.seed)
    return module


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
