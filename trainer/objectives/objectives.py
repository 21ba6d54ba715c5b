"""What is learned: an objective names the tensors it needs, builds its module, draws noise, gives its loss.

An objective knows no rank, engine or optimiser. Every draw is a function of the example's key alone: small ones
are made in the loader's threads, the posterior's noise on the device (a CPU takes five times as long to draw it
as to read the latents, and a GPU would be sent twice the bytes). A loss is the mean over the micro-batch, in
float32. Metrics come as sums and counts (`x_sum`, `x_count`), which may be added or averaged over micro-batches
and ranks: `read_metrics` divides.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowmask.data_pipeline.randomness import generator, mix64, normal, uniform
from flowmask.data_pipeline.read.loader import Batch
from flowmask.models.config import ModelConfig
from flowmask.models.dit import velocity
from flowmask.models.errors import ConfigError
from flowmask.models.flow import TRAIN_TIMESTEPS, draw_timestep, interpolate, path_time, sample_posterior
from flowmask.models.mask_decoder import MaskDecoder, dice_loss, focal_loss
from flowmask.models.vae import LatentStats, normalise
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.config import ObjectiveConfig

Metrics = dict[str, Tensor]
_EPS, _SPECIAL, _TIME = 1, 2, 3  # keep the draws of an example apart


class Objective(Protocol):
    """One thing to learn; a function of (module, batch), with the facts around it."""

    needs: frozenset[str]

    def build(self) -> nn.Module:
        """The module to train, float32 on the CPU, with the weights of `model.wan`."""

    def prepare(self, batch: Batch) -> Batch:
        """Fill `batch.draws`; called in the loader's threads."""

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Mean loss of a micro-batch (float32 scalar), and metrics as sums and counts."""

    def settings(self) -> dict[str, Any]:
        """The conventions that the weights depend on: recorded in every checkpoint and export."""


class FlowMatching:
    """Fine-tune the DiT: a velocity that carries a video's latent (t=1) to the named mask's latent (t=0)."""

    needs = frozenset({"video_mean", "video_logvar", "mask_mean", "text"})

    def __init__(self, config: ObjectiveConfig, model: ModelConfig, stats: LatentStats) -> None:
        self._config, self._model, self._stats = config, model, stats

    def build(self) -> nn.Module:
        """The DiT, widened for direct video injection unless that is switched off."""
        dit: Any = WanFolder(self._model.wan).transformer(video_injection=self._config.video_injection)
        return dit

    def settings(self) -> dict[str, Any]:
        return {
            "objective": "flow_matching",
            "text_tokens": self._model.text_tokens,
            "mask_latent_norm": self._model.mask_latent_norm,
            "video_injection": self._config.video_injection,
        }

    def prepare(self, batch: Batch) -> Batch:
        """Draws of each example from its own key: timestep int64 [B]."""
        u_special, u = torch.tensor(
            [[uniform(key, number=draw) for key in batch.keys] for draw in (_SPECIAL, _TIME)], dtype=torch.float64
        )
        batch.draws["timestep"] = self._timestep(u_special, u)
        return batch

    @staticmethod
    def noise(batch: Batch) -> Tensor:
        """The posterior's eps, float32 [B 16 f h w] on the batch's device; `draws` may hold another."""
        assert batch.video_mean is not None
        if "eps" in batch.draws:
            return batch.draws["eps"]
        shape, device = batch.video_mean.shape[1:], batch.video_mean.device
        return torch.stack([normal(mix64(key, _EPS), shape, device) for key in batch.keys])

    def _timestep(self, u_special: Tensor, u: Tensor) -> Tensor:
        if self._config.boundary_bias:
            return draw_timestep(u_special, u, boundary_probability=self._config.boundary_probability)
        return (u * TRAIN_TIMESTEPS).long() + 1  # uniform over 1..1000: the boundary is one timestep among all

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        video_latent, mask_latent = self._endpoints(batch)
        timestep = batch.draws["timestep"]
        x_t, target = interpolate(video_latent, mask_latent, path_time(timestep))
        text = batch.padded_text()
        dit: Any = module  # or an engine around it
        predicted = velocity(dit, x_t=x_t, video_latent=video_latent, timestep=timestep, text=text)
        losses = (predicted - target).square().flatten(1).mean(1)
        at_video = (timestep == TRAIN_TIMESTEPS).float()
        detached = losses.detach()
        return losses.mean(), {
            "loss_at_video_sum": (detached * at_video).sum(),
            "loss_at_video_count": at_video.sum(),
            "loss_elsewhere_sum": (detached * (1 - at_video)).sum(),
            "loss_elsewhere_count": (1 - at_video).sum(),
        }

    def _endpoints(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Video latent (norm), mask latent (raw unless `mask_latent_norm` says so), float32 [B 16 f h w]."""
        assert batch.video_mean is not None and batch.video_logvar is not None and batch.mask_mean is not None
        raw = batch.video_mean.float()
        if self._config.start_point_augmentation:
            raw = sample_posterior(raw, batch.video_logvar.float(), self.noise(batch))
        mask_latent = batch.mask_mean.float()
        if self._model.mask_latent_norm == "video":
            mask_latent = normalise(self._stats, mask_latent)
        return normalise(self._stats, raw), mask_latent


class MaskDecoding:
    """Fine-tune the VAE's decoder, with one output channel, to give a mask back from its raw latent."""

    needs = frozenset({"mask_mean", "mask_pixels"})

    def __init__(self, config: ObjectiveConfig, model: ModelConfig, stats: LatentStats) -> None:
        self._config, self._model = config, model

    def build(self) -> nn.Module:
        vae: Any = WanFolder(self._model.wan).vae()
        return MaskDecoder.from_vae(vae)

    def settings(self) -> dict[str, Any]:
        return {"objective": "mask_decoder"}

    def prepare(self, batch: Batch) -> Batch:
        """With `latent_noise_std`: noise float32 [B 16 f h w], to bear what a DiT gets wrong."""
        assert batch.mask_mean is not None
        if self._config.latent_noise_std:
            shape = batch.mask_mean.shape[1:]
            noises = [torch.randn(shape, generator=generator(key)) for key in batch.keys]
            batch.draws["noise"] = self._config.latent_noise_std * torch.stack(noises)
        return batch

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        assert batch.mask_mean is not None and batch.mask_pixels is not None
        latent = batch.mask_mean.float()
        if "noise" in batch.draws:
            latent = latent + batch.draws["noise"]
        logits, target = module(latent), batch.mask_pixels.unsqueeze(1)  # [B 1 F H W] both
        focal = focal_loss(logits, target, alpha=self._config.focal_alpha, gamma=self._config.focal_gamma)
        dice = dice_loss(logits, target)
        loss = self._config.focal_weight * focal + self._config.dice_weight * dice
        return loss, _means(focal=focal, dice=dice)


def _means(**losses: Tensor) -> Metrics:
    metrics: Metrics = {}
    for name, loss in losses.items():
        metrics[f"{name}_sum"] = loss.detach()
        metrics[f"{name}_count"] = torch.ones_like(loss)
    return metrics


_KINDS: dict[str, type[FlowMatching] | type[MaskDecoding]] = {
    "flow_matching": FlowMatching,
    "mask_decoder": MaskDecoding,
}


def objective_named(config: ObjectiveConfig, *, model: ModelConfig, stats: LatentStats) -> Objective:
    """The objective that `objective.kind` names; ConfigError lists the known ones.

    stats: the latents' mean and standard deviation, from the cache's manifest (there is no VAE in training).
    """
    kind = _KINDS.get(config.kind)
    if kind is None:
        raise ConfigError(f"objective.kind is {config.kind!r}; known: {', '.join(_KINDS)}")
    return kind(config, model, stats)


def read_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the global batch from sums and counts; a metric that nothing counted towards is left out."""
    means = {}
    for name, total in sums.items():
        if name.endswith("_sum") and sums[f"{name[:-4]}_count"]:
            means[name[:-4]] = total / sums[f"{name[:-4]}_count"]
    return means
