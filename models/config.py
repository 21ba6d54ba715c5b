"""Config sections that the models read, and the strict frozen base of every section."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every config section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """Which weights, and the conventions they were trained with."""

    wan: Path = Field(description="Wan2.1 folder in the diffusers layout")
    init: str | None = Field(None, description="start from these weights: a run, an export or a FlowRVS .pth")
    init_ema: bool = Field(True, description="take the EMA weights of `init`")
    text_tokens: int = Field(256, ge=1, le=512, description="padded text length that the DiT sees")
    mask_latent_norm: Literal["none", "video"] = "none"
    mask_decoder: str = Field("vae", description="decoder run, FlowRVS .pth, or 'vae': the VAE's own decoder")


class SamplerConfig(Section):
    """Euler integration from the video (t=1) to the mask (t=0)."""

    steps: int = Field(1, ge=1, le=1000)
    shift: float = Field(3.0, gt=0)
