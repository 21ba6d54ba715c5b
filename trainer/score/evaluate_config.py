"""The config of one evaluation."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from flowmask.data_pipeline.config import DataSourceConfig, FrameBox
from flowmask.models.config import (
    AskedConventions,
    Attention,
    Precision,
    SamplerConfig,
    Section,
    Tf32,
    refuse_attention_in_fp32,
)
from flowmask.models.errors import ConfigError
from flowmask.trainer.predict.windows.cut import WindowConfig
from flowmask.trainer.score.archive import Layout


class EvaluateModel(Section):
    """The frozen parts, if they are not where the checkpoint's run found them."""

    wan: Path | None = Field(None, description="Wan2.1 folder; None: the one of the run")


class CalibrateConfig(Section):
    """Choice of the presence threshold, before the evaluation, on other videos than the scored ones."""

    enabled: bool = Field(False, description="choose a presence threshold first; also `flowmask evaluate --calibrate`")
    data: DataSourceConfig | None = Field(
        None, description="a dataset with true masks, sentences of both kinds, and no video of `data`"
    )


class EvaluateConfig(Section):
    """One evaluation: weights, videos and sampling."""

    out: Path = Field(description="a new folder, or one of an evaluation, whose results are replaced at the end")
    checkpoint: str = Field(description="run folder, export or FlowRVS .pth")
    mask_decoder: str | None = Field(
        None, description="decoder run, FlowRVS .pth or 'vae'; None: the one in the config of the checkpoint's run"
    )
    model: EvaluateModel = EvaluateModel()
    data: DataSourceConfig
    conventions: AskedConventions = AskedConventions()
    box: FrameBox | None = Field(
        None, description="box in px into which frames are resized; None: the size of the training"
    )
    window: WindowConfig = WindowConfig()
    sampler: SamplerConfig = SamplerConfig()
    ema: bool = Field(True, description="evaluate the averaged weights")
    precision: Precision = Field("bf16", description="precision of the DiT")
    attention: Attention = Field(
        "native", description="attention kernel of the DiT; all but native need a GPU and bf16"
    )
    encoder_precision: Precision | None = Field(
        None, description="precision of the text and video encoders; null: that of the training's cache"
    )
    decoder_precision: Precision = Field("fp32", description="precision of the mask decoder")
    tf32: Tf32 = None
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    sentences_per_batch: int = Field(
        4, ge=1, description="sentences of one video whose decoded masks may wait to be written; does not change scores"
    )
    max_videos: int | None = Field(None, ge=1, description="only the first videos of the dataset")
    shuffled_text: bool = Field(
        False, description="also score each expression with a sentence about other objects of its video"
    )
    decoder_score: bool = Field(
        False, description="also score the true masks after encoding and decoding: the upper bound"
    )
    seed: int = Field(0, ge=0, description="seed of the choice of sentences for shuffled_text")
    archive: Layout | None = Field(
        None, description="also write submission.zip, in the layout of this benchmark's server"
    )
    protocol: str | None = Field(
        None,
        description="also score by this benchmark's protocol: a file in trainer/score/protocols, or an installed one",
    )
    presence: str | None = Field(
        None,
        description="a calibrated evaluation's `out`: masks of sentences below its threshold are emptied; "
        "null: the threshold of the export; none: no mask is emptied",
    )
    calibrate: CalibrateConfig = CalibrateConfig()
    report_examples: int = Field(12, ge=0, description="expressions on the report's contact sheet")

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        refuse_attention_in_fp32(self.attention, self.precision)
        return self

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if self.calibrate.enabled and self.calibrate.data is None:
            raise ValueError(
                "calibrate.data is missing; set its source, root and split, on which the threshold is chosen"
            )
        if self.calibrate.enabled and self.presence is not None:
            raise ValueError(
                f"presence is {self.presence}, but calibrate.enabled also chooses a threshold; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _protocol_fits(self) -> Self:
        from flowmask.trainer.score.protocols import protocol_named

        if self.protocol is None:
            return self
        protocol = protocol_named(self.protocol)
        protocol.refuse_source(self.data.source, name=self.protocol)
        if self.window.frames is not None and protocol.hears:
            raise ConfigError(
                f"protocol is {self.protocol!r}, which needs the logits of the whole video, and window.frames is "
                f"{self.window.frames}; set window.frames=null"
            )
        return self
