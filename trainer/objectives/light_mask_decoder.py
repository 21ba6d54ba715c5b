"""Train a light decoder from scratch to reconstruct a mask from its raw latent.

Only the module differs from `mask_decoder.py`.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flowmask.models.config import LightDecoderConfig
from flowmask.trainer.objectives.base import ObjectiveConfig, Shapes
from flowmask.trainer.objectives.mask_decoder import Decoding, DecodingConfig

if TYPE_CHECKING:
    from torch import nn


class LightMaskDecodingConfig(DecodingConfig):
    """The decoder is a light one."""

    kind: Literal["light_mask_decoder"] = "light_mask_decoder"
    network: LightDecoderConfig = LightDecoderConfig()


class LightMaskDecoding(Decoding):
    """Decodes masks with a few convolutions on the latent grid."""

    Config: ClassVar[type[ObjectiveConfig]] = LightMaskDecodingConfig
    wan_parts = ()

    def build(self) -> "nn.Module":
        from flowmask.models.decoders.light import LightMaskDecoder

        return LightMaskDecoder.fresh(self._config.network)

    def blueprint(self, shapes: Shapes, *, layers: int | None = None) -> "nn.Module":
        from flowmask.models.decoders.either import empty_light

        return empty_light(self._config.network)

    def settings(self) -> dict[str, Any]:
        from flowmask.models.decoders.light import SETTING

        return {**super().settings(), SETTING: self._config.network.model_dump()}
