"""The config of validation during training: fast on clips of a cache, and official on whole videos."""

from typing import Literal, Self

from pydantic import Field, model_validator

from flowmask.data_pipeline.config import CachePlace, DataSourceConfig, FrameBox
from flowmask.models.config import SamplerConfig, Section

BestMetric = Literal["eval_loss", "eval_jf", "eval_whole_jf"]


class WholeVideosConfig(Section):
    """Held-out videos of a dataset, scored like `flowmask evaluate`; sampled with evaluate.sampler."""

    data: DataSourceConfig
    videos: int = Field(default=16, ge=1, description="number of videos to score, spread over the dataset")
    every_steps: int | None = Field(
        default=None,
        ge=1,
        description="steps between two scorings, a multiple of evaluate.every_steps; null: at every evaluation",
    )
    protocol: str | None = Field(
        default=None, description="also score by the protocol of this benchmark: a file in trainer/score/protocols"
    )
    box: FrameBox | None = Field(
        default=None, description="box in px into which frames are resized; null: the size of the training's clips"
    )


class ValidationConfig(Section):
    """Evaluation of the EMA weights while training: losses and J&F on a fixed part of a held-out cache."""

    every_steps: int | None = Field(default=None, ge=1, description="null: never by steps")
    every_epochs: float | None = Field(
        default=None, gt=0, description="epochs between two evaluations; 0.5: twice per epoch; null: never by epochs"
    )
    cache: CachePlace | None = Field(
        default=None, description="held-out cache of the same kind: a folder or s3:// URL; null: the training's cache"
    )
    examples: int = Field(default=32, ge=1, description="number of examples for the losses")
    timesteps: tuple[int, ...] = Field(
        default=(1000, 800, 600, 400, 200, 1),
        min_length=1,
        description="timesteps at which the loss is measured, 1..1000",
    )
    jf_examples: int = Field(
        default=8, ge=0, description="number of these examples that are sampled, decoded and scored"
    )
    overlays: int = Field(
        default=2, ge=0, description="number of those that are drawn as overlay videos, also for MLflow"
    )
    sampler: SamplerConfig = SamplerConfig()
    whole_videos: WholeVideosConfig | None = Field(
        default=None, description="also score whole held-out videos of a dataset; null: none"
    )
    best: BestMetric | None = Field(
        default=None, description="metric that chooses checkpoints/best; null: eval_jf, or eval_loss without it"
    )

    @property
    def wanted(self) -> bool:
        """Whether a run is evaluated at all."""
        return self.every_steps is not None or self.every_epochs is not None

    def scores_whole_videos(self, step: int) -> bool:
        """Whether the evaluation at a step scores whole videos."""
        return self.whole_videos is not None and step % (self.whole_videos.every_steps or 1) == 0

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        wrong = [t for t in self.timesteps if not 1 <= t <= 1000]
        if wrong or len(set(self.timesteps)) < len(self.timesteps):
            raise ValueError(f"evaluate.timesteps is {list(self.timesteps)}; each must be in 1..1000, once")
        if self.best == "eval_jf" and not self.jf_examples:
            raise ValueError("evaluate.best is eval_jf, but evaluate.jf_examples is 0; raise it, or choose eval_loss")
        if self.best == "eval_whole_jf" and self.whole_videos is None:
            raise ValueError(
                "evaluate.best is eval_whole_jf, but evaluate.whole_videos is null; set evaluate.whole_videos.data"
            )
        return self

    @model_validator(mode="after")
    def _whole_videos_have_their_turn(self) -> Self:
        asked, every = self.whole_videos.every_steps if self.whole_videos else None, self.every_steps
        if asked is None or not self.wanted:
            return self
        if every is None:
            raise ValueError(
                f"evaluate.whole_videos.every_steps is {asked}, but evaluate.every_steps is null: give it, or leave "
                "the first out, for whole videos at every evaluation"
            )
        if asked % every:
            fits = " or ".join(str(n) for n in (asked // every * every, (asked // every + 1) * every) if n)
            raise ValueError(
                f"evaluate.whole_videos.every_steps is {asked}; it must be a multiple of evaluate.every_steps "
                f"{every}. Nearest: {fits}"
            )
        return self
