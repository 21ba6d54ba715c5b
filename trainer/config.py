"""The config of one training run, and the combinations of values that cannot run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from flowmask.data_pipeline.config import LoaderConfig
from flowmask.models.config import LoraConfig, MayChange, ModelConfig, Section
from flowmask.models.safe.secrets import SecretUri
from flowmask.trainer.objectives import objective_class, of_one_kind, section
from flowmask.trainer.objectives.base import ObjectiveConfig
from flowmask.trainer.train_config import TrainConfig
from flowmask.trainer.validation_config import ValidationConfig

STATE_BYTES = 16  # bytes of a checkpoint per trained parameter: fp32 master, two moments, EMA


class CheckpointConfig(Section):
    """When checkpoints are saved, and how many are kept."""

    every_steps: int = Field(default=1000, ge=1, description="steps between two checkpoints")
    keep_last: int = Field(default=2, ge=1, description="number of newest checkpoints to keep")
    milestone_every_steps: int | None = Field(
        default=None, ge=1, description="steps between milestone checkpoints, which are never deleted; null: none"
    )


class EmaConfig(Section):
    """Exponential moving average of the weights; update s decays by 0 if s = 1, else min(decay, s/(9+s))."""

    decay: float = Field(default=0.9999, ge=0, lt=1, description="largest decay of the averaged weights")


class GuardConfig(Section):
    """Limits for non-finite values and spikes. A spike is judged against the last steps, on a log scale."""

    max_consecutive_skips: int = Field(default=10, ge=1, description="skipped steps in a row before the run stops")
    grad_norm_spike: float | None = Field(
        default=10.0, gt=0, description="skip a step this many robust standard deviations above the median; null: never"
    )
    loss_spike: float | None = Field(default=None, gt=0, description="the same for the loss")
    window_steps: int = Field(default=200, ge=2, description="number of last steps for the median")
    judge_after_steps: int = Field(default=50, ge=2, description="steps before spikes are detected")

    @model_validator(mode="after")
    def _window_fills(self) -> Self:
        if self.judge_after_steps > self.window_steps:
            raise ValueError(
                f"guard.judge_after_steps is {self.judge_after_steps}; it must be at most "
                f"guard.window_steps {self.window_steps}"
            )
        return self


class TrackingConfig(Section):
    """Where MLflow stores the run."""

    enabled: bool = Field(default=True, description="whether the run is logged to MLflow")
    uri: SecretUri | None = Field(
        default=None, description="MLflow URI, with a password as ${oc.env:NAME}; None: mlflow.db beside the run folder"
    )
    experiment: str = Field(default="flowmask", description="MLflow experiment; created if missing")
    run_name: str | None = Field(
        default=None, min_length=1, description="name of the MLflow run; null: stage or run folder, and start time"
    )
    stage: str | None = Field(default=None, description="the tag stage; a curriculum sets it to the stage's name")
    parent: Path | None = Field(default=None, description="folder of the parent MLflow run; a curriculum sets it")
    end_timeout_s: float = Field(default=30.0, ge=0, description="seconds that the end of a run waits for the server")
    peak_tflops: float | None = Field(
        default=None, gt=0, description="dense bf16 peak of one device, for MFU; None: by the GPU's name"
    )


class RunConfig(Section):
    """The complete config of a training run."""

    out: MayChange[Path] = Field(description="run folder; a run that exists there is resumed")
    model: ModelConfig
    data: LoaderConfig
    objective: Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(section)] = Field(
        default_factory=section, description="the objective; its keys depend on its kind"
    )
    lora: LoraConfig | None = Field(default=None, description="train LoRA adapters; null: train all weights")
    train: TrainConfig
    checkpoint: MayChange[CheckpointConfig] = CheckpointConfig()
    ema: EmaConfig = EmaConfig()
    guard: MayChange[GuardConfig] = GuardConfig()
    evaluate: MayChange[ValidationConfig] = ValidationConfig()
    tracking: MayChange[TrackingConfig] = TrackingConfig()
    launch: MayChange[Any] = Field(default_factory=dict, description="the section of the launcher, saved with the run")

    @property
    def makes(self) -> str:
        """The part that is trained, by the names of `trainer/predict/parts.py`."""
        return objective_class(self.objective.kind).makes

    @model_validator(mode="after")
    def _module_can(self) -> Self:
        kind, train = self.objective.kind, self.train
        self.data.refuse_url(self.evaluate.cache, key="evaluate.cache")
        if self.data.mix and train.counts_epochs:
            raise ValueError(
                "train.epochs and train.decay_at_epochs count epochs of one data.cache, but caches of data.mix have "
                "different epochs; give train.steps and train.decay_at_steps: `flowmask plan` shows the epochs of each"
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
            raise ValueError(f"lora has nothing to adapt in {module}, which has no blocks: remove the lora section")
        for key, usual in (("compile", "false"), ("attention", "native")):
            if (value := str(getattr(train, key)).lower()) != usual:
                raise ValueError(f"train.{key} is {value}, but {module} has no blocks; set it to {usual}")
        if (ranks := train.sequence_parallel) > 1:
            raise ValueError(f"train.sequence_parallel is {ranks}, but {module} has no tokens to split; set it to 1")
        return self


def in_todays_terms(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's saved config; keys of later versions get their defaults, which keep its behaviour."""
    sections = {key: value for key, value in saved.items() if key in RunConfig.model_fields}
    sections["objective"] = of_one_kind(sections.get("objective", {}))
    try:
        known = RunConfig.model_validate(sections)
    except ValidationError:  # from a version with other keys: the comparison lists them
        return dict(saved)
    return {**saved, **known.model_dump(mode="json")}
