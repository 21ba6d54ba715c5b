"""Objectives without a cache or a DiT: made by kind, on batches that are functions of their keys."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flowmask.data_pipeline.read.loader import Batch
from flowmask.models.config import ModelConfig
from flowmask.models.vae import LatentStats
from flowmask.trainer.objectives import objective_named, section

STATS = LatentStats(mean=tuple([0.5] * 16), std=tuple([2.0] * 16))


def make(kind: str = "flow_matching", *, stats: LatentStats = STATS, wan: Path = Path(), **settings: Any) -> Any:
    model = ModelConfig(wan=wan, mask_latent_norm=settings.pop("mask_latent_norm", "none"))
    return objective_named(section({"kind": kind, **settings}), model=model, stats=stats)


def batch_of(keys: list[int], *, shape: tuple[int, ...] = (16, 1, 1, 1)) -> Batch:
    """Random latents that are also functions of the key."""
    sources = [torch.Generator().manual_seed(key) for key in keys]
    latents = [[torch.randn(shape, generator=source) for source in sources] for _ in range(3)]
    count = torch.arange(len(keys))
    batch = Batch(step=0, example_ids=count, positions=count, epochs=count, keys=keys, digest=0)
    batch.video_mean, batch.video_logvar, batch.mask_mean = (torch.stack(some) for some in latents)
    batch.text = torch.zeros(len(keys), 4, 8)
    return batch


class ExactVelocity:
    """Stands for a perfect DiT: it computes the exact velocity from x_t and the injected video."""

    patch_embedding = SimpleNamespace(weight=torch.zeros(1), in_channels=32)

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        x_t, video = hidden_states.chunk(2, dim=1)
        t = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return (video - (x_t - t * video) / (1 - t),)


class SilentVelocity(ExactVelocity):
    """Stands for a DiT whose output is zero."""

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.zeros_like(hidden_states[:, :16]),)
