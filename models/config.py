"""Config sections read by the models, and the strict frozen base of every section."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator


class MayChangeOnResume:
    """Marks a field: a resumed run may have a new value."""


class OnlyRoundsOtherwise:
    """Marks a field: another value only rounds differently. A started run keeps its value."""


def _checkpointing(value: Any) -> Any:
    """`true` and `false` from older configs mean full and none."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


T = TypeVar("T")
Recompute = Literal["none", "selective", "full"]
Recomputation = Annotated[Recompute, BeforeValidator(_checkpointing)]
Precision = Literal["bf16", "fp32"]
Attention = Literal["native", "cudnn", "flash", "flash3", "sage"]
TrainAttention = Literal["native", "cudnn", "flash"]  # the kernels with a backward pass
Tf32 = Annotated[
    bool | None,
    Field(
        description="on a GPU, true: round fp32 factors of products and convolutions to TF32; null: only convolutions"
    ),
]
MayChange = Annotated[T, MayChangeOnResume]
OnlyRounds = Annotated[T, OnlyRoundsOtherwise]
FlowStart = Literal["video", "noise"]  # start of the flow
Predicted = Literal["velocity", "mask"]  # output of the DiT
FLOW_PATH = ("start", "predicts")  # keys of those two; weights record them if they are not the first value


class Section(BaseModel):
    """Base of every config section: frozen; an unknown key and a non-finite number are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def refuse_attention_in_fp32(attention: Attention, precision: Precision, *, section: str = "") -> None:
    """Raises ValueError, like a validator: only the native kernel supports fp32. section: prefix of both keys."""
    if attention != "native" and precision == "fp32":
        raise ValueError(
            f"{section}attention is {attention}, whose kernels take bf16, and {section}precision is fp32; "
            f"set {section}precision to bf16, or {section}attention to native"
        )


class ModelConfig(Section):
    """The weights, and the conventions of their training."""

    wan: Path = Field(description="Wan2.1 folder in the diffusers layout")
    init: str | None = Field(None, description="start from these weights: a run, an export or a FlowRVS .pth")
    init_ema: bool = Field(True, description="use the EMA weights of `init`")
    text_tokens: int = Field(256, ge=1, le=512, description="padded text length in tokens")
    mask_latent_norm: Literal["none", "video"] = Field(
        "none", description="normalisation of mask latents; video: like the video's, as in weights of 2025"
    )
    mask_decoder: str = Field("vae", description="decoder run, FlowRVS .pth, or 'vae': the VAE's own decoder")


class LightDecoderConfig(Section):
    """The size of a light mask decoder; also given by its weights."""

    width: int = Field(64, ge=1, le=1024, description="channels on the latent grid")
    depth: int = Field(1, ge=0, le=64, description="residual blocks of two convolutions")


class AskedConventions(Section):
    """Conventions that can't be derived from weights; null: as recorded with them, else those of FlowRVS in 2026."""

    pixel_norm: Literal["half", "imagenet"] | None = Field(None, description="half if nobody tells")
    text_tokens: int | None = Field(None, ge=1, le=512, description="256 if nobody tells")
    mask_latent_norm: Literal["none", "video"] | None = Field(None, description="none if nobody tells")
    lowercase: bool | None = Field(None, description="true if nobody tells")


class LoraConfig(Section):
    """Low-rank updates of some of the DiT's projections in place of training all its weights."""

    rank: int = Field(32, ge=1, description="rank of each update")
    alpha: float | None = Field(None, gt=0, description="updates are scaled by alpha / rank; null: by 1")
    dropout: float = Field(0.0, description="must be 0: a step may depend only on seed and example")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
        min_length=1,
        description="ends of the names of linear layers with adapters; default: attention and feed-forward",
    )
    also_train: tuple[str, ...] | None = Field(
        None, description="fully trained modules; null: patch_embedding if the video is injected, else none"
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
    shift: float = Field(
        3.0, gt=0, description="time shift: the larger, the closer the times of several steps are to the video"
    )
