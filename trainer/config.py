"""The config of one training run, and the combinations of values that cannot run.

What depends on the number of processes is checked by `accumulation_steps`, which the launcher calls too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from flowmask.data_pipeline.config import LoaderConfig
from flowmask.models.config import (
    LoraConfig,
    MayChange,
    ModelConfig,
    OnlyRounds,
    Precision,
    Recomputation,
    Section,
    Tf32,
    TrainAttention,
    refuse_attention_in_fp32,
)
from flowmask.models.errors import ConfigError
from flowmask.models.safe.secrets import SecretUri
from flowmask.trainer.objectives import objective_class, of_one_kind, section
from flowmask.trainer.objectives.base import ObjectiveConfig
from flowmask.trainer.validation_config import ValidationConfig

STATE_BYTES = 16  # of a checkpoint, for each trained parameter: fp32 master, two moments, EMA


class TrainConfig(Section):
    """Optimiser, batch, precision and parallelism."""

    steps: MayChange[int | None] = Field(default=None, ge=1, description="optimiser steps in all; may be raised later")
    epochs: MayChange[int | None] = Field(default=None, ge=1, description="instead of `steps`: epochs of data.cache")
    seed: int = Field(default=0, description="of the order of examples and of their random draws")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="adamw8bit: moments in 8 bits, a quarter of their memory (bitsandbytes)"
    )
    lr: float = Field(default=5e-5, gt=0, description="largest learning rate")
    weight_decay: float = Field(default=5e-4, ge=0, description="AdamW's, decoupled from the gradient")
    weight_decay_exclude: Literal["none", "norms_biases"] = Field(
        default="none", description="norms_biases: scales of norms and biases do not decay"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's, of the two moments")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's, below the root of the second moment")
    grad_clip: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    global_batch: int = Field(ge=1, description="examples in one optimiser step, over all processes")
    micro_batch: MayChange[int] = Field(default=1, ge=1, description="examples in one forward pass of one process")
    sequence_parallel: MayChange[int] = Field(default=1, ge=1, description="processes that share an example's tokens")
    zero_stage: MayChange[int] = Field(
        default=1, ge=0, le=3, description="what ranks share out: 1 optimiser state, 2 also gradients, 3 also weights"
    )
    precision: Precision = Field(default="bf16", description="of forward and backward passes; masters are fp32")
    tf32: Tf32 = None
    schedule: Literal["constant", "cosine", "multistep"] = Field(default="constant", description="rate after warm-up")
    schedule_steps: int | None = Field(default=None, ge=1, description="length of the schedule; None: first `steps`")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises from 0")
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1, description="cosine: where the learning rate ends")
    decay_at_steps: tuple[int, ...] = Field(default=(), description="multistep: where the learning rate drops")
    decay_at_epochs: MayChange[tuple[int, ...]] = Field(default=(), description="the same by epochs, as `epochs`")
    decay_factor: float = Field(default=0.9, gt=0, le=1, description="multistep: by how much it drops")
    offload_optimizer: MayChange[bool] = Field(default=False, description="keep the optimiser state in host memory")
    activation_checkpointing: MayChange[Recomputation] = Field(
        default="none", description="recompute activations in the backward pass: none, selective (cheap ones), full"
    )
    compile: OnlyRounds[bool] = Field(default=False, description="compile the DiT's blocks; needs a compiler")
    attention: OnlyRounds[TrainAttention] = Field("native", description="the DiT's kernels; all but native: on a GPU")
    log_every_steps: MayChange[int] = Field(default=10, ge=1, description="steps between two lines of log.txt")
    collective_timeout_s: MayChange[float] = Field(
        default=1800.0, gt=0, description="how long a rank waits for the others before the job ends"
    )

    @property
    def last_step(self) -> int:
        """The step at which the run is finished; of a config whose epochs are settled as steps."""
        assert self.steps is not None, "epochs are settled when the cache is opened, see trainer/state/length.py"
        return self.steps

    @property
    def counts_epochs(self) -> bool:
        """Whether something here is known as steps only once the cache is."""
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
                raise ValueError(f"train.{key} is {list(drops)}; the numbers must rise")
        length = self.schedule_steps or self.steps
        if self.schedule == "cosine" and length is not None and self.warmup_steps >= length:
            raise ValueError(
                f"train.warmup_steps is {self.warmup_steps}; it must be below the schedule's {length} steps"
            )
        return self


class CheckpointConfig(Section):
    """When the run's state is saved, and how much of it stays."""

    every_steps: int = Field(default=1000, ge=1, description="steps between two checkpoints")
    keep_last: int = Field(default=2, ge=1, description="newest checkpoints that stay")
    milestone_every_steps: int | None = Field(
        default=None, ge=1, description="checkpoints of these steps are made too, and stay for ever"
    )


class EmaConfig(Section):
    """Exponential moving average of the weights; update s decays by 0 if s = 1, else min(decay, s/(9+s))."""

    decay: float = Field(default=0.9999, ge=0, lt=1, description="largest decay of the averaged weights")


class GuardConfig(Section):
    """What happens when the numbers break. A spike is judged against the steps taken last, on a log scale."""

    max_consecutive_skips: int = Field(default=10, ge=1, description="skipped steps in a row before the run stops")
    grad_norm_spike: float | None = Field(
        default=10.0, gt=0, description="robust standard deviations above the median; null: never skip"
    )
    loss_spike: float | None = Field(default=None, gt=0, description="the same for the loss")
    window_steps: int = Field(default=200, ge=2, description="steps that the median is taken over")
    judge_after_steps: int = Field(default=50, ge=2, description="steps taken before anything is a spike")

    @model_validator(mode="after")
    def _window_fills(self) -> Self:
        if self.judge_after_steps > self.window_steps:
            raise ValueError(
                f"guard.judge_after_steps is {self.judge_after_steps}; it must be at most "
                f"guard.window_steps {self.window_steps}"
            )
        return self


class TrackingConfig(Section):
    """Where MLflow keeps the run."""

    enabled: bool = Field(default=True, description="whether MLflow gets the run")
    uri: SecretUri | None = Field(
        default=None, description="any MLflow URI, a password as ${oc.env:NAME}; None: mlflow.db beside the run folder"
    )
    experiment: str = Field(default="flowmask", description="MLflow's experiment, which is made where it is missing")
    end_timeout_s: float = Field(default=30.0, ge=0, description="how long the end of a run waits for the server")
    peak_tflops: float | None = Field(
        default=None, gt=0, description="dense bf16 peak of one device, for MFU; None: by the GPU's name"
    )


class RunConfig(Section):
    """Everything that decides a training run."""

    out: MayChange[Path] = Field(description="run folder; an existing run there is resumed")
    model: ModelConfig
    data: LoaderConfig
    objective: Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(section)] = Field(
        default_factory=section, description="what is learned; its keys are those of its kind"
    )
    lora: LoraConfig | None = Field(default=None, description="train adapters; null: train the whole module")
    train: TrainConfig
    checkpoint: MayChange[CheckpointConfig] = CheckpointConfig()
    ema: EmaConfig = EmaConfig()
    guard: MayChange[GuardConfig] = GuardConfig()
    evaluate: MayChange[ValidationConfig] = ValidationConfig()
    tracking: MayChange[TrackingConfig] = TrackingConfig()
    launch: MayChange[Any] = Field(default_factory=dict, description="the launcher's own section, saved with the run")

    @property
    def makes(self) -> str:
        """Which part its weights are, by the names of `trainer/predict/parts.py`."""
        return objective_class(self.objective.kind).makes

    @model_validator(mode="after")
    def _module_can(self) -> Self:
        kind, train = self.objective.kind, self.train
        if self.data.mix and train.counts_epochs:
            raise ValueError(
                "train.epochs and train.decay_at_epochs are those of one data.cache, and each cache of data.mix has "
                "its own; give train.steps and train.decay_at_steps: `flowmask plan` says how many epochs of each"
            )
        objective, module = objective_class(kind), f"the module of objective.kind {kind}"
        self.objective.refuse_beside(self.model, lora=self.lora is not None)
        if self.evaluate.whole_videos is not None and objective.makes != "dit":
            raise ValueError(
                f"evaluate.whole_videos needs a DiT that makes masks of videos, but {module} makes none; set it to null"
            )
        if objective.makes == "video_dit" and self.evaluate.wanted and self.evaluate.jf_examples:
            raise ValueError(
                f"evaluate.jf_examples is {self.evaluate.jf_examples}, but {module} makes no masks; set it to 0"
            )
        if train.activation_checkpointing != "none" and not objective.recomputes():
            raise ValueError(
                f"train.activation_checkpointing is {train.activation_checkpointing}, but {module} can't recompute; "
                "set it to none"
            )
        if objective.has_blocks:
            return self
        if self.lora is not None:
            raise ValueError(f"lora has nothing to adapt in {module}, which has no blocks: drop the lora section")
        for key, usual in (("compile", "false"), ("attention", "native")):
            if (value := str(getattr(train, key)).lower()) != usual:
                raise ValueError(f"train.{key} is {value}, but {module} has no blocks; set it to {usual}")
        if (ranks := train.sequence_parallel) > 1:
            raise ValueError(f"train.sequence_parallel is {ranks}, but {module} has no tokens to split; set it to 1")
        return self


def in_todays_terms(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's saved config, with keys of later versions at their defaults, which change nothing."""
    sections = {key: value for key, value in saved.items() if key in RunConfig.model_fields}
    sections["objective"] = of_one_kind(sections.get("objective", {}))
    try:
        known = RunConfig.model_validate(sections)
    except ValidationError:  # of a version that knew other keys: whoever compares lists them
        return dict(saved)
    return {**saved, **known.model_dump(mode="json")}


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-batches that one process runs for one optimiser step; ConfigError if there's a remainder.

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
    """The processes that share a batch, in words: `4 processes`, or `2 groups of 2 processes` that share one each."""
    ranks = train.sequence_parallel
    groups = world_size // ranks
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
