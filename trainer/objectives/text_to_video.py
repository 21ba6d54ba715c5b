"""Text to video, as Wan2.1 was trained: a velocity that carries noise (t=1) to a video's latent (t=0).

Makes an initial DiT if none is published: `flowmask export` turns the run into a Wan2.1 folder. The masks of the
cache are not read.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flowmask.trainer.objectives.base import ObjectiveConfig, Shapes
from flowmask.trainer.objectives.flow_matching import FlowMatching

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowmask.data_pipeline.read.loader import Batch


class TextToVideoConfig(ObjectiveConfig):
    """No further keys: t is uniform, and the target is the mean of the video's posterior."""

    kind: Literal["text_to_video"] = "text_to_video"


class TextToVideo(FlowMatching):
    """The squared error of the velocity from a video to noise."""

    Config: ClassVar[type[ObjectiveConfig]] = TextToVideoConfig
    needs = frozenset({"video_mean", "text"})
    makes = "video_dit"
    noiseless: ClassVar[dict[str, Any]] = {}

    def build(self) -> "nn.Module":
        """The unchanged DiT of model.wan: 16 input channels."""
        from flowmask.models.weights.wan import WanFolder

        return WanFolder(self._model.wan).transformer(video_injection=False)

    def blueprint(self, shapes: Shapes, *, layers: int | None = None) -> "nn.Module":
        return shapes.dit(video_injection=False, layers=layers)

    def settings(self) -> dict[str, Any]:
        return {"objective": self._config.kind, "text_tokens": self._model.text_tokens, "video_injection": False}

    def fake_draws(self, batch: "Batch") -> "dict[str, Tensor]":
        import torch

        assert batch.video_mean is not None
        return {"timestep": torch.full_like(batch.example_ids, 500), "eps": torch.zeros(batch.video_mean.shape)}

    def _timestep(self, u_special: "Tensor", u: "Tensor") -> "Tensor":
        from flowmask.models.flow import TRAIN_TIMESTEPS

        return (u * TRAIN_TIMESTEPS).long() + 1

    def loss(self, module: "nn.Module", batch: "Batch") -> "tuple[Tensor, dict[str, Tensor]]":
        from flowmask.models.dit import velocity
        from flowmask.models.flow import interpolate, path_time
        from flowmask.models.vae import normalise

        assert batch.video_mean is not None
        video_latent = normalise(self._stats, batch.video_mean.float())
        timestep, dit = batch.draws["timestep"], module
        x_t, target = interpolate(self.noise(batch), video_latent, path_time(timestep))
        predicted = velocity(dit, x_t=x_t, video_latent=video_latent, timestep=timestep, text=batch.padded_text())  # type: ignore[arg-type]
        losses = self.errors(predicted, target)
        batch.note_finite(prediction=predicted, loss=losses)
        return losses.mean(), {}
