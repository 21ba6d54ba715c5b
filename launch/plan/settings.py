"""Ways to run one training: ZeRO stage, offload, recomputation and micro-batch, and the memory of each."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import nn

from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.data import shapes_of
from flowmask.launch.plan.memory import (
    EIGHT_BIT_MOMENTS_BYTES,
    FP32_MOMENTS_BYTES,
    DeviceMemory,
    HostMemory,
    Setting,
    device_memory,
    host_memory,
)
from flowmask.launch.plan.model import Architecture, architecture, trained_module
from flowmask.launch.plan.one_pass import Shape, batch_bytes, micro_batch_pass
from flowmask.models.config import Recompute
from flowmask.models.cost.dry_run import Pass
from flowmask.trainer.train_config import TrainConfig

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class SettingPlan:
    """One way to run the config at its world size; `slowdown`: factor by recomputation."""

    setting: Setting
    device: DeviceMemory
    host: HostMemory
    slowdown: float


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of a module's parameters: all, the trained ones, and the largest trained one."""

    all: int
    trained: int
    largest: int

    @classmethod
    def of(cls, module: nn.Module) -> "ParameterCounts":
        every = [parameter.numel() for parameter in module.parameters()]
        trained = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
        return cls(sum(every), sum(trained), max(trained))


@dataclass(frozen=True)
class Planner:
    """Plans the config at any setting; only values that depend on the setting are computed again."""

    job: TrainJob
    shapes: Architecture
    largest: Shape
    counts: ParameterCounts
    passes: dict[Recompute, Pass]

    def at(self, setting: Setting) -> SettingPlan:
        cost, train = self.passes[setting.recompute], self.job.train
        one = batch_bytes(self.job, self.largest, text_dim=self.shapes.dit_config["text_dim"])
        groups = max(1, setting.ranks // train.sequence_parallel)
        ahead = one * self.job.data.prefetch_batches * max(1, train.global_batch // (groups * train.micro_batch))
        working = 2 if setting.precision == "bf16" else 4
        frozen = (self.counts.all - self.counts.trained) * working
        device = device_memory(
            setting,
            parameters=self.counts.trained,
            activations=cost.peak_bytes,
            batch_bytes=ahead,
            frozen_bytes=frozen / (setting.ranks if setting.effective_stage == 3 else 1),
            largest=self.counts.largest,
        )
        host = host_memory(
            setting, parameters=self.counts.trained, batch_bytes=ahead, module_parameters=self.counts.all
        )
        return SettingPlan(setting, device, host, cost.flop / self.passes["none"].flop)

    def all(self) -> list[SettingPlan]:
        """All settings: every ZeRO stage, with and without recomputation and offload."""
        ranks, precision = self.job.launch.world_size, self.job.train.precision
        return [
            self.at(Setting(stage, precision, offload, ranks, name, _moments_bytes(self.job)))
            for offload in (False, True)
            for name in self.passes
            for stage in range(4)
            if self._allowed(zero_stage=stage, offload_optimizer=offload, activation_checkpointing=name)
        ]

    def _allowed(self, **changes: Any) -> bool:
        """Whether the config would be accepted with these settings of `train`."""
        try:
            TrainConfig.model_validate({**self.job.train.model_dump(), **changes})
        except ValidationError:
            return False
        return True


class Settings:
    """Memory of a job with other settings of `train`, for the largest clip of its existing caches."""

    def __init__(self, job: TrainJob) -> None:
        self._shapes = architecture(job.model.wan)
        self._largest = max(shapes_of(job, None, []), key=lambda shape: (shape.pixels, str(shape)))
        self._counts = ParameterCounts.of(trained_module(job, self._shapes))
        self._passes: dict[tuple[int, Recompute], Pass] = {}

    def of(self, job: TrainJob) -> SettingPlan:
        """job: the original one; only batch, recomputation, ZeRO stage and offload may differ."""
        setting = own_setting(job)
        passes = {kind: self._pass(job, kind) for kind in (RECOMPUTE[0], setting.recompute)}
        return Planner(job, self._shapes, self._largest, self._counts, passes).at(setting)

    def _pass(self, job: TrainJob, kind: Recompute) -> Pass:
        key = job.train.micro_batch, kind
        if key not in self._passes:
            self._passes[key] = micro_batch_pass(job, self._shapes, self._largest, recompute=kind)
        return self._passes[key]


def own_setting(job: TrainJob) -> Setting:
    """The setting that a job has."""
    train = job.train
    return Setting(
        train.zero_stage,
        train.precision,
        train.offload_optimizer,
        job.launch.world_size,
        train.activation_checkpointing,
        _moments_bytes(job),
    )


def _moments_bytes(job: TrainJob) -> float:
    return EIGHT_BIT_MOMENTS_BYTES if job.train.optimizer == "adamw8bit" else FP32_MOMENTS_BYTES
