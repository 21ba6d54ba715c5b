"""Fine-tune the DiT: a velocity that carries a video's latent (t=1) to the named mask's latent (t=0).

The paper's other variants are settings: start from noise with the video injected; predict the mask; random weights.
The launcher reads only the section and the facts, so functions that compute import torch themselves.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from flowmask.data_pipeline.randomness import mix64, normal, uniform
from flowmask.models.config import FLOW_PATH, FlowStart, ModelConfig, Predicted
from flowmask.models.cost.flops import dit_tokens, dit_training_flop
from flowmask.trainer.objectives.base import Grid, Makes, Objective, ObjectiveConfig, Shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowmask.data_pipeline.read.loader import Batch

_EPS, _SPECIAL, _TIME = 1, 2, 3  # keys that separate the random draws of an example


class FlowMatchingConfig(ObjectiveConfig):
    """The path, and the random draws, of flow matching."""

    kind: Literal["flow_matching"] = "flow_matching"
    boundary_bias: bool = Field(default=True, description="draw t=1 with boundary_probability; off: uniform t")
    boundary_probability: float = Field(
        default=0.5, ge=0, le=1, description="probability of t=1 if boundary_bias is on"
    )
    start_point_augmentation: bool = Field(default=True, description="sample the video's posterior; off: its mean")
    video_injection: bool = Field(default=True, description="the DiT also sees the video latent at every t")
    start: FlowStart = Field(default="video", description="start of the flow to the mask: the video, or noise")
    predicts: Predicted = Field(default="velocity", description="output of the DiT: a velocity, or the mask")
    weights_seed: int | None = Field(
        default=None, ge=0, description="start from random weights drawn with this seed; null: from those of model.wan"
    )

    @model_validator(mode="after")
    def _noise_leaves_the_video_to_injection(self) -> Self:
        if self.start == "noise" and not self.video_injection:
            raise ValueError(
                "objective.start is noise, so the DiT sees the video only by injection; set "
                "objective.video_injection=true"
            )
        if self.start == "noise" and self.start_point_augmentation:
            raise ValueError(
                "objective.start is noise, which start_point_augmentation can't sample from a posterior; set "
                "objective.start_point_augmentation=false"
            )
        return self

    def refuse_beside(self, model: ModelConfig, *, lora: bool) -> None:
        other = f"model.init is {model.init}" if model.init is not None else "lora adapts trained ones" if lora else ""
        if self.weights_seed is not None and other:
            raise ValueError(
                f"objective.weights_seed is {self.weights_seed}, which starts from random weights, but {other}; "
                "set one of them to null"
            )


class FlowMatching(Objective):
    """The squared error of the velocity."""

    Config: ClassVar[type[ObjectiveConfig]] = FlowMatchingConfig
    needs = frozenset({"video_mean", "video_logvar", "mask_mean", "text"})
    makes: ClassVar[Makes] = "dit"
    wan_parts = ("transformer",)
    has_blocks = True
    noiseless: ClassVar[Mapping[str, Any]] = {"start_point_augmentation": False}

    def build(self) -> "nn.Module":
        """The DiT; its input has more channels for the injected video, if video injection is on."""
        from flowmask.models.weights.wan import WanFolder

        folder, injected, seed = WanFolder(self._model.wan), self._config.video_injection, self._config.weights_seed
        dit: Any
        if seed is None:
            dit = folder.transformer(video_injection=injected)
        else:
            dit = folder.random_transformer(video_injection=injected, seed=seed)
        return dit

    def blueprint(self, shapes: Shapes, *, layers: int | None = None) -> "nn.Module":
        return shapes.dit(video_injection=self._config.video_injection, layers=layers)

    def settings(self) -> dict[str, Any]:
        return {
            "objective": self._config.kind,
            "text_tokens": self._model.text_tokens,
            "mask_latent_norm": self._model.mask_latent_norm,
            "video_injection": self._config.video_injection,
            **self._config.model_dump(include=set(FLOW_PATH), exclude_defaults=True),
        }

    def tokens(self, shape: Mapping[str, Any], latent: Grid) -> int:
        return dit_tokens(shape, latent)

    def training_flop(self, shape: Mapping[str, Any], latent: Grid, *, adapters: bool = False) -> float | None:
        return dit_training_flop(shape, latent, text_tokens=self._model.text_tokens, adapters=adapters)

    def fake_draws(self, batch: "Batch") -> "dict[str, Tensor]":
        import torch

        assert batch.mask_mean is not None
        return {"timestep": torch.full_like(batch.example_ids, 500), "eps": torch.zeros(batch.mask_mean.shape)}

    def prepare(self, batch: "Batch") -> "Batch":
        """Draws of each example from its own key: timestep int64 [B]."""
        import torch

        u_special, u = torch.tensor(
            [[uniform(key, number=draw) for key in batch.keys] for draw in (_SPECIAL, _TIME)], dtype=torch.float64
        )
        batch.draws["timestep"] = self._timestep(u_special, u)
        return batch

    @staticmethod
    def noise(batch: "Batch") -> "Tensor":
        """Random part of the start: the posterior's eps or, if the path starts from noise, the start itself.

        Standard normal float32 [B 16 f h w] on the batch's device; `draws` may hold another.
        """
        assert batch.video_mean is not None
        if "eps" in batch.draws:
            return batch.draws["eps"]
        import torch

        shape, device = batch.video_mean.shape[1:], batch.video_mean.device
        return torch.stack([normal(mix64(key, _EPS), shape, device) for key in batch.keys])

    def _timestep(self, u_special: "Tensor", u: "Tensor") -> "Tensor":
        from flowmask.models.flow import TRAIN_TIMESTEPS, draw_timestep

        if self._config.boundary_bias:
            return draw_timestep(u_special, u, boundary_probability=self._config.boundary_probability)
        return (u * TRAIN_TIMESTEPS).long() + 1  # uniform over 1..1000: the boundary is only one of them

    def loss(self, module: "nn.Module", batch: "Batch") -> "tuple[Tensor, dict[str, Tensor]]":
        from flowmask.models.dit import velocity
        from flowmask.models.flow import TRAIN_TIMESTEPS, interpolate, path_time

        video_latent, mask_latent = self._endpoints(batch)
        timestep = batch.draws["timestep"]
        start = self.noise(batch) if self._config.start == "noise" else video_latent
        x_t, target = interpolate(start, mask_latent, path_time(timestep))
        if self._config.predicts == "mask":
            target = mask_latent
        text = batch.padded_text()
        dit: Any = module  # or the engine that wraps it
        predicted = velocity(dit, x_t=x_t, video_latent=video_latent, timestep=timestep, text=text)
        losses = self.errors(predicted, target)
        batch.note_finite(prediction=predicted, loss=losses)
        at_video = (timestep == TRAIN_TIMESTEPS).float()
        detached = losses.detach()
        return losses.mean(), {
            "loss_at_video_sum": (detached * at_video).sum(),
            "loss_at_video_count": at_video.sum(),
            "loss_elsewhere_sum": (detached * (1 - at_video)).sum(),
            "loss_elsewhere_count": (1 - at_video).sum(),
        }

    def errors(self, predicted: "Tensor", target: "Tensor") -> "Tensor":
        """Each example's error [B] of velocities [B 16 f h w]."""
        return (predicted - target).square().flatten(1).mean(1)

    def _endpoints(self, batch: "Batch") -> "tuple[Tensor, Tensor]":
        """Video latent (norm), mask latent (raw unless `mask_latent_norm` is set), float32 [B 16 f h w]."""
        from flowmask.models.flow import sample_posterior
        from flowmask.models.vae import normalise

        assert batch.video_mean is not None and batch.video_logvar is not None and batch.mask_mean is not None
        raw = batch.video_mean.float()
        if self._config.start_point_augmentation:
            eps = self.noise(batch)
            batch.note_finite(noise=eps)
            raw = sample_posterior(raw, batch.video_logvar.float(), eps)
        mask_latent = batch.mask_mean.float()
        if self._model.mask_latent_norm == "video":
            mask_latent = normalise(self._stats, mask_latent)
        return normalise(self._stats, raw), mask_latent
