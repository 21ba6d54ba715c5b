"""Train a light decoder, from scratch, to give a mask back from its raw latent.

All but the module is as in `mask_decoder.py`.
"""

from typing import Any, ClassVar, Literal

from torch import nn

from flowmask.models.config import LightDecoderConfig
from flowmask.models.decoders.either import empty_light
from flowmask.models.decoders.light import SETTING, LightMaskDecoder
from flowmask.trainer.objectives.base import ObjectiveConfig, Shapes
from flowmask.trainer.objectives.mask_decoder import Decoding, DecodingConfig


class LightMaskDecodingConfig(DecodingConfig):
    """The decoder is a light one."""

    kind: Literal["light_mask_decoder"] = "light_mask_decoder"
    network: LightDecoderConfig = LightDecoderConfig()


class LightMaskDecoding(Decoding):
    """By a few convolutions on the latent grid."""

    Config: ClassVar[type[ObjectiveConfig]] = LightMaskDecodingConfig
    wan_parts = ()

    def build(self) -> nn.Module:
        return LightMaskDecoder.fresh(self._config.network)

    def blueprint(self, shapes: Shapes, *, layers: int | None = None) -> nn.Module:
        return empty_light(self._config.network)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), SETTING: self._config.network.model_dump()}
