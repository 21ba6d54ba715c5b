"""The section `train` of a run's config, and how processes share its batch (the launcher uses it too)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from flowmask.models.config import (
    MayChange,
    OnlyRounds,
    Precision,
    Recomputation,
    Section,
    Tf32,
    TrainAttention,
    refuse_attention_in_fp32,
)
from flowmask.models.errors import ConfigError


class TrainConfig(Section):
    """Optimiser, batch, precision and parallelism."""

    steps: MayChange[int | None] = Field(
        default=None, ge=1, description="number of optimiser steps; may be raised later"
    )
    epochs: MayChange[int | None] = Field(default=None, ge=1, description="epochs of data.cache, in place of `steps`")
    seed: int = Field(default=0, description="seed of the order of examples and of their random draws")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="adamw8bit: 8-bit moments, with a quarter of the memory (bitsandbytes)"
    )
    lr: float = Field(default=5e-5, gt=0, description="largest learning rate")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay of AdamW, decoupled from the gradient")
    weight_decay_exclude: Literal["none", "norms_biases"] = Field(
        default="none", description="parameters without weight decay; norms_biases: scales of norms, and biases"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="decay rates of AdamW's two moments")
    eps: float = Field(default=1e-8, gt=0, description="added by AdamW to the root of the second moment")
    grad_clip: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    global_batch: int = Field(ge=1, description="examples in one optimiser step, over all processes")
    micro_batch: MayChange[int] = Field(default=1, ge=1, description="examples in one forward pass of one process")
    sequence_parallel: MayChange[int] = Field(default=1, ge=1, description="processes that share an example's tokens")
    zero_stage: MayChange[int] = Field(
        default=1,
        ge=0,
        le=3,
        description="ZeRO: shard over ranks 1 the optimiser state, 2 also gradients, 3 also weights; 0 nothing",
    )
    precision: Precision = Field(
        default="bf16", description="precision of forward and backward passes; master weights are fp32"
    )
    tf32: Tf32 = None
    schedule: Literal["constant", "cosine", "multistep"] = Field(default="constant", description="rate after warm-up")
    schedule_steps: int | None = Field(default=None, ge=1, description="length of the schedule; None: first `steps`")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises from 0")
    final_lr_fraction: float = Field(
        default=0.0, ge=0, le=1, description="cosine: final learning rate as a fraction of lr"
    )
    decay_at_steps: tuple[int, ...] = Field(default=(), description="multistep: steps at which the learning rate drops")
    decay_at_epochs: MayChange[tuple[int, ...]] = Field(
        default=(), description="multistep: epochs at which the learning rate drops"
    )
    decay_factor: float = Field(default=0.9, gt=0, le=1, description="multistep: factor of each drop")
    offload_optimizer: MayChange[bool] = Field(default=False, description="keep the optimiser state in host memory")
    activation_checkpointing: MayChange[Recomputation] = Field(
        default="none",
        description="activations to recompute in the backward pass: none, selective (the cheap ones) or full",
    )
    compile: OnlyRounds[bool] = Field(default=False, description="compile the DiT's blocks; needs a C++ compiler")
    attention: OnlyRounds[TrainAttention] = Field(
        "native", description="attention kernel of the DiT; all but native need a GPU"
    )
    log_every_steps: MayChange[int] = Field(default=10, ge=1, description="steps between two lines of log.txt")
    collective_timeout_s: MayChange[float] = Field(
        default=1800.0, gt=0, description="seconds that a rank waits for the others before the job ends"
    )

    @property
    def last_step(self) -> int:
        """The step at which the run is finished. Needs `steps`: epochs must be converted first."""
        assert self.steps is not None, (
            "epochs are converted to steps when the cache is opened, see trainer/state/length.py"
        )
        return self.steps

    @property
    def counts_epochs(self) -> bool:
        """Whether some setting can be converted to steps only with the open cache."""
        return self.epochs is not None or bool(self.decay_at_epochs)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is None and self.epochs is None:
            raise ValueError("key train.steps is missing; give it, or train.epochs")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs}; give one and set the other to null"
            )
        if self.decay_at_steps and self.decay_at_epochs:
            raise ValueError(
                f"train.decay_at_steps is {list(self.decay_at_steps)} and train.decay_at_epochs "
                f"{list(self.decay_at_epochs)}; give one and set the other to []"
            )
        return self

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        if self.global_batch % self.micro_batch:
            raise ValueError(_batch_message(self, 1))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas is {list(self.betas)}; each must be in [0, 1)")
        refuse_attention_in_fp32(self.attention, self.precision, section="train.")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("train.offload_optimizer needs train.zero_stage 1, 2 or 3; it is 0")
        if self.offload_optimizer and self.optimizer == "adamw8bit":
            raise ValueError(
                "train.offload_optimizer keeps fp32 moments and train.optimizer is adamw8bit; choose one of the two"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError("train.compile needs train.zero_stage 0, 1 or 2; it is 3, whose hooks can't be compiled")
        if self.compile and self.sequence_parallel > 1:
            raise ValueError(
                f"train.compile can't be had with train.sequence_parallel {self.sequence_parallel}, whose hooks it "
                "does not see: choose one of them"
            )
        if self.activation_checkpointing == "selective" and self.zero_stage == 3:
            raise ValueError(
                "train.activation_checkpointing is selective and train.zero_stage is 3, whose layers' products can't "
                "be kept: choose full, or stage 0, 1 or 2"
            )
        if self.schedule == "multistep" and not (self.decay_at_steps or self.decay_at_epochs):
            raise ValueError(
                "train.schedule is multistep but train.decay_at_steps is empty; name the steps, or decay_at_epochs"
            )
        for key in ("decay_at_steps", "decay_at_epochs"):
            if list(drops := getattr(self, key)) != sorted(set(drops)):
                raise ValueError(f"train.{key} is {list(drops)}; the numbers must increase")
        length = self.schedule_steps or self.steps
        if self.schedule == "cosine" and length is not None and self.warmup_steps >= length:
            raise ValueError(
                f"train.warmup_steps is {self.warmup_steps}; it must be below the schedule's {length} steps"
            )
        return self


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-batches of one process in one optimiser step. Raises ConfigError if the batch does not divide.

    `train.sequence_parallel` processes work on the same micro-batch, so they count as one.
    """
    ranks = train.sequence_parallel
    if world_size % ranks:
        fits = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ConfigError(
            f"train.sequence_parallel is {ranks}; it must divide the number of processes, {world_size}: {fits}"
        )
    groups = world_size // ranks
    if train.global_batch % (train.micro_batch * groups):
        raise ConfigError(_batch_message(train, groups))
    return train.global_batch // (train.micro_batch * groups)


def workers(train: TrainConfig, world_size: int) -> str:
    """The processes that share a batch, in words: `4 processes`, or `2 groups of 2 processes` that share an example."""
    ranks, groups = train.sequence_parallel, world_size // train.sequence_parallel
    if ranks == 1:
        return f"{groups} process{'es' if groups > 1 else ''}"
    return f"{groups} group{'s' if groups > 1 else ''} of {ranks} processes"


def _batch_message(train: TrainConfig, groups: int) -> str:
    batch, micro, per_pass = train.global_batch, train.micro_batch, train.micro_batch * groups
    below, above = batch // per_pass * per_pass, -(-batch // per_pass) * per_pass
    fits = " or ".join(str(fit) for fit in (below, above) if fit > 0)
    micros = [m for m in range(1, batch + 1) if batch % (m * groups) == 0]
    nearest = min(micros, key=lambda m: abs(m - micro)) if micros else None
    other = f", or train.micro_batch {nearest}" if nearest else ""
    who = workers(train, groups * train.sequence_parallel)
    return (
        f"train.global_batch is {batch}; it must be a multiple of train.micro_batch {micro} x {who} "
        f"= {per_pass}. Nearest: {fits}{other}"
    )
