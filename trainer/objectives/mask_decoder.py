"""Fine-tune the VAE's decoder, with one output channel, to reconstruct a mask from its raw latent.

Has the shared parts of all decoders: input, loss and metrics. Functions that compute import torch themselves.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from flowmask.models.config import Recompute
from flowmask.trainer.objectives.base import Objective, ObjectiveConfig, Shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowmask.data_pipeline.read.loader import Batch


class DecodingConfig(ObjectiveConfig):
    """The weighted sum of a focal and a Dice loss, of any mask decoder."""

    latent_noise_std: float = Field(default=0.0, ge=0, description="noise added to the input latent")
    focal_weight: float = Field(default=8.0, ge=0, description="share of the focal loss")
    focal_alpha: float = Field(
        default=0.25, ge=0, le=1, description="focal weight of the mask's pixels; other pixels have 1 - focal_alpha"
    )
    focal_gamma: float = Field(
        default=2.0, ge=0, description="focal exponent: the larger, the less a correct pixel counts"
    )
    dice_weight: float = Field(default=4.0, ge=0, description="share of the Dice loss")


class MaskDecodingConfig(DecodingConfig):
    """The decoder is the VAE's own."""

    kind: Literal["mask_decoder"] = "mask_decoder"


class Decoding(Objective):
    """Training of masks from latents, with any module."""

    needs = frozenset({"mask_mean", "mask_pixels"})
    makes = "mask_decoder"
    noiseless: ClassVar[Mapping[str, Any]] = {"latent_noise_std": 0.0}

    def settings(self) -> dict[str, Any]:
        return {"objective": self._config.kind}

    def prepare(self, batch: "Batch") -> "Batch":
        """With `latent_noise_std`: normal noise of that deviation, float32 [B 16 f h w], like the errors of a DiT."""
        import torch

        from flowmask.data_pipeline.randomness import generator

        assert batch.mask_mean is not None
        if self._config.latent_noise_std:
            shape = batch.mask_mean.shape[1:]
            noises = [torch.randn(shape, generator=generator(key)) for key in batch.keys]
            batch.draws["noise"] = self._config.latent_noise_std * torch.stack(noises)
        return batch

    def loss(self, module: "nn.Module", batch: "Batch") -> "tuple[Tensor, dict[str, Tensor]]":
        import torch

        assert batch.mask_mean is not None and batch.mask_pixels is not None
        latent = batch.mask_mean.float()
        if "noise" in batch.draws:
            batch.note_finite(noise=batch.draws["noise"])
            latent = latent + batch.draws["noise"]
        logits, target = module(latent), batch.mask_pixels.unsqueeze(1)  # [B 1 F H W] both
        batch.note_finite(prediction=logits)
        if batch.annotated is None:
            focal, dice = self._losses(logits, target)
        else:  # each clip's mean is over its annotated frames
            known = [(logits[b : b + 1, :, on], target[b : b + 1, :, on]) for b, on in enumerate(batch.annotated)]
            focal, dice = (torch.stack(each).mean() for each in zip(*(self._losses(*pair) for pair in known)))
        loss = self._config.focal_weight * focal + self._config.dice_weight * dice
        one = torch.ones_like(loss)
        sums = {"focal_sum": focal.detach(), "focal_count": one, "dice_sum": dice.detach(), "dice_count": one}
        return loss, sums

    def _losses(self, logits: "Tensor", target: "Tensor") -> "tuple[Tensor, Tensor]":
        """Focal and Dice loss of clips [B 1 F H W]."""
        from flowmask.models.mask_decoder import dice_loss, focal_loss

        focal = focal_loss(logits, target, alpha=self._config.focal_alpha, gamma=self._config.focal_gamma)
        return focal, dice_loss(logits, target)


class MaskDecoding(Decoding):
    """Decodes masks with the VAE's decoder, with one output channel."""

    Config: ClassVar[type[ObjectiveConfig]] = MaskDecodingConfig
    wan_parts = ("vae",)

    def build(self) -> "nn.Module":
        from flowmask.models.mask_decoder import MaskDecoder
        from flowmask.models.weights.wan import WanFolder

        vae: Any = WanFolder(self._model.wan).vae()
        return MaskDecoder.from_vae(vae)

    def blueprint(self, shapes: Shapes, *, layers: int | None = None) -> "nn.Module":
        from flowmask.models.mask_decoder import MaskDecoder

        return MaskDecoder.from_vae(shapes.vae())

    def recompute(self, module: "nn.Module", kind: Recompute) -> None:
        decoder: Any = module
        decoder.recompute(kind)
