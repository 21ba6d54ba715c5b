"""Config sections that the models read, and the strict frozen base of every section."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator


class MayChangeOnResume:
    """Marks a field: a run that is resumed may have another value than it began with."""


class OnlyRoundsOtherwise:
    """Marks a field: another value computes the same, rounded otherwise. A run that has begun keeps its value."""


def _checkpointing(value: Any) -> Any:
    """`true` and `false`, as older configs have it, are full and none."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


T = TypeVar("T")
Recompute = Literal["none", "selective", "full"]
Recomputation = Annotated[Recompute, BeforeValidator(_checkpointing)]
Precision = Literal["bf16", "fp32"]
Attention = Literal["native", "cudnn", "flash", "flash3", "sage"]
TrainAttention = Literal["native", "cudnn", "flash"]  # the kernels that have a backward pass
Tf32 = Annotated[
    bool | None,
    Field(description="fp32 on a GPU rounds the factors of products to TF32, many times faster; null: of convolutions"),
]
MayChange = Annotated[T, MayChangeOnResume]
OnlyRounds = Annotated[T, OnlyRoundsOtherwise]
FlowStart = Literal["video", "noise"]  # what the flow carries to the mask
Predicted = Literal["velocity", "mask"]  # what the DiT's output is
FLOW_PATH = ("start", "predicts")  # settings of those two, which weights tell where they are not the first of each


class Section(BaseModel):
    """Base of every config section: frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def refuse_attention_in_fp32(attention: Attention, precision: Precision, *, section: str = "") -> None:
    """ValueError, as a validator's: of the kernels only native takes fp32. section: what stands before both keys."""
    if attention != "native" and precision == "fp32":
        raise ValueError(
            f"{section}attention is {attention}, whose kernels take bf16, and {section}precision is fp32; "
            f"set {section}precision to bf16, or {section}attention to native"
        )


class ModelConfig(Section):
    """Which weights, and the conventions they were trained with."""

    wan: Path = Field(description="Wan2.1 folder in the diffusers layout")
    init: str | None = Field(None, description="start from these weights: a run, an export or a FlowRVS .pth")
    init_ema: bool = Field(True, description="take the EMA weights of `init`")
    text_tokens: int = Field(256, ge=1, le=512, description="padded text length that the DiT sees")
    mask_latent_norm: Literal["none", "video"] = Field(
        "none", description="video: the mask's latent is normalised as the video's, as in weights of 2025"
    )
    mask_decoder: str = Field("vae", description="decoder run, FlowRVS .pth, or 'vae': the VAE's own decoder")


class LightDecoderConfig(Section):
    """The size of a light mask decoder; its weights tell it too."""

    width: int = Field(64, ge=1, le=1024, description="channels on the latent grid")
    depth: int = Field(1, ge=0, le=64, description="residual blocks of two convolutions")


class AskedConventions(Section):
    """Conventions that weights alone do not show; null: as recorded with the weights, else as FlowRVS's of 2026."""

    pixel_norm: Literal["half", "imagenet"] | None = Field(None, description="half if nobody tells")
    text_tokens: int | None = Field(None, ge=1, le=512, description="256 if nobody tells")
    mask_latent_norm: Literal["none", "video"] | None = Field(None, description="none if nobody tells")
    lowercase: bool | None = Field(None, description="true if nobody tells")


class LoraConfig(Section):
    """Low-rank updates of some of the DiT's projections in place of training it whole."""

    rank: int = Field(32, ge=1, description="rank of each update")
    alpha: float | None = Field(None, gt=0, description="updates are scaled by alpha / rank; null: by 1")
    dropout: float = Field(0.0, description="only 0: a step's numbers depend on nothing but seed and example")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
        min_length=1,
        description="ends of the names of linear layers; default: attention and feed-forward",
    )
    also_train: tuple[str, ...] | None = Field(
        None, description="modules trained whole; null: patch_embedding if the video is injected, else none"
    )

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout:
            raise ValueError(
                f"lora.dropout is {dropout}; only 0 can be repeated and resumed at any number of processes. "
                "Lower lora.rank or raise train.weight_decay instead"
            )
        return dropout

    @property
    def scale(self) -> float:
        """Factor of the update B·A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class SamplerConfig(Section):
    """Euler integration from the video (t=1) to the mask (t=0)."""

    steps: int = Field(1, ge=1, le=1000, description="Euler steps, each one pass of the DiT")
    shift: float = Field(3.0, gt=0, description="times of several steps lie nearer to the video the larger it is")
