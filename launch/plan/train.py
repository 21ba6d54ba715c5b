"""The plan of a training: memory and time of each setting, from the run's own config, cache and module.

Needs no GPU, no weights and no finished cache: all assumptions are in `notes`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.data import length_of, shapes_of
from flowmask.launch.plan.encoders import Encoders, share_of_peak
from flowmask.launch.plan.failures import STATED, Cluster, SavePlan, Saving, plan_saves
from flowmask.launch.plan.memory import Setting
from flowmask.launch.plan.model import Architecture, architecture, objective_of, trained_module
from flowmask.launch.plan.one_pass import Shape, micro_batch_pass
from flowmask.launch.plan.settings import RECOMPUTE, ParameterCounts, Planner, SettingPlan, own_setting
from flowmask.models.cost.flops import TRAINING_PASSES
from flowmask.models.decoders.light import LightMaskDecoder
from flowmask.models.errors import ConfigError
from flowmask.trainer.config import STATE_BYTES
from flowmask.trainer.train_config import accumulation_steps

GPUS_GB = (24, 40, 48, 80)  # common GPUs
_WORLD_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class GpuSpeed:
    """The assumed speed of one GPU: `tflops` of its peak, `mfu` of that in useful work."""

    tflops: float
    mfu: float
    gpu: str

    @property
    def flop_per_s(self) -> float:
        return self.tflops * 1e12 * self.mfu


@dataclass(frozen=True)
class Disk:
    """The largest disk space of a run's checkpoints: `checkpoints`, of `checkpoint_bytes` each.

    They hold only trained weights: not those that LoRA or a mask decoder leaves unchanged.
    """

    checkpoint_bytes: float
    checkpoints: int

    @classmethod
    def of(cls, job: TrainJob, module: nn.Module) -> "Disk":
        """module: of the run, on the meta device. Counts the kept ones, one being written, milestones and the best."""
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        every, steps = job.checkpoint.milestone_every_steps, job.train.steps
        milestones = steps // every if every and steps else 0
        most = job.checkpoint.keep_last + 1 + milestones + job.evaluate.wanted
        return cls(STATE_BYTES * trained, most)

    @property
    def bytes(self) -> float:
        return self.checkpoint_bytes * self.checkpoints


@dataclass(frozen=True)
class WorldPlan:
    """The config's setting at another number of GPUs."""

    world_size: int
    accumulation: int
    device_bytes: float
    host_bytes: float
    step_s: float
    hours: float | None  # None: the number of steps is not known yet


@dataclass(frozen=True)
class TrainPlan:
    """All results of `flowmask plan` for a training."""

    kind: str
    parameters: int
    trained: int
    shapes: dict[str, float]  # clip shape -> its share of the examples
    largest: str  # the shape for which memory is planned
    micro_batch: int
    tokens: int  # of one example of the largest shape; 0 for a module without tokens
    flop_per_example: float  # forward and backward, mean over the shapes
    flop_per_step: float
    steps: int | None  # None: `epochs` are set and the cache is missing
    epochs: float | None  # None: `steps` are set and the cache is missing
    epochs_of_each: list[float]  # of the caches of data.mix; `epochs` is the smallest
    checkpoint_bytes: float
    disk_bytes: float
    saves: SavePlan
    chosen: SettingPlan
    settings: list[SettingPlan]
    worlds: list[WorldPlan]
    speed: GpuSpeed
    decoder_share: float | None  # FLOPs of a light mask decoder as a share of the VAE decoder's
    notes: list[str] = field(default_factory=list)

    def fits(self, memory_gb: float) -> "SettingPlan | None":
        """The fastest setting that fits: without offload if possible, least recomputation, lowest ZeRO stage."""
        found = [plan for plan in self.settings if plan.device.peak <= memory_gb * 1e9]
        return min(found, key=_effort, default=None)


def _effort(plan: SettingPlan) -> tuple[bool, float, int]:
    return plan.setting.offload, plan.slowdown, plan.setting.zero_stage


def plan_training(job: TrainJob, *, speed: GpuSpeed, clip: Shape | None = None, cluster: Cluster = STATED) -> TrainPlan:
    """clip: the shape to plan for if there is no finished cache."""
    shapes = architecture(job.model.wan)
    notes = list(shapes.notes)
    if job.scores is not None:
        notes.append("evaluate.whole_videos is not counted: passes of whole videos, and the encoders at the start")
    mixture = shapes_of(job, clip, notes)
    job, epochs = length_of(job, notes)
    largest = max(mixture, key=lambda shape: (shape.pixels, str(shape)))
    module = trained_module(job, shapes)
    counts = ParameterCounts.of(module)
    objective, config = objective_of(job), getattr(module, "config", {})
    kinds = RECOMPUTE if objective.recomputes() else RECOMPUTE[:1]
    passes = {recompute: micro_batch_pass(job, shapes, largest, recompute=recompute) for recompute in kinds}
    forward = {largest: passes["none"].forward_flop / job.train.micro_batch}
    flop = sum(
        share * _training_flop(job, shapes, shape, config=config, forward=forward.get(shape))
        for shape, share in mixture.items()
    )
    planner = Planner(job, shapes, largest, counts, passes)
    chosen = planner.at(own_setting(job))
    light = module.network if isinstance(module, LightMaskDecoder) else None
    step_flop, disk = job.train.global_batch * flop, Disk.of(job, module)
    worlds = _worlds(job, planner, chosen.setting, step_flop, speed)
    ranks, nodes = job.launch.world_size, job.launch.nodes
    step_s = next(world.step_s for world in worlds if world.world_size == ranks)
    saving = Saving.of(cluster, checkpoint_bytes=disk.checkpoint_bytes, nodes=nodes, ranks=ranks)
    return TrainPlan(
        kind=job.objective.kind,
        parameters=counts.all,
        trained=counts.trained,
        shapes={str(shape): share for shape, share in mixture.items()},
        largest=str(largest),
        micro_batch=job.train.micro_batch,
        tokens=objective.tokens(config, largest.latent),
        flop_per_example=flop,
        flop_per_step=step_flop,
        steps=job.train.steps,
        epochs=min(epochs, default=job.train.epochs),
        epochs_of_each=epochs if job.data.mix else [],
        checkpoint_bytes=disk.checkpoint_bytes,
        disk_bytes=disk.bytes,
        saves=plan_saves(saving, every_steps=job.checkpoint.every_steps, step_s=step_s),
        chosen=chosen,
        settings=planner.all(),
        worlds=worlds,
        speed=speed,
        decoder_share=None if light is None else Encoders(shapes).share_of_vae(largest, light),
        notes=notes,
    )


def _worlds(job: TrainJob, planner: Planner, setting: Setting, step_flop: float, speed: GpuSpeed) -> list[WorldPlan]:
    """World sizes that divide the batch evenly; the config's own is one of them."""
    dtype, products = "float32" if job.train.precision == "fp32" else "bfloat16", objective_of(job).has_blocks
    share, plans = share_of_peak(dtype, tf32=job.train.tf32, products=products), []
    for world in sorted({*_WORLD_SIZES, job.launch.world_size}):
        try:
            accumulation = accumulation_steps(job.train, world)
        except ConfigError:
            continue
        plan = planner.at(replace(setting, ranks=world))
        step_s = step_flop / (world * speed.flop_per_s * share)
        per_node = min(world, job.launch.processes_per_node)
        hours = None if job.train.steps is None else job.train.steps * step_s / 3600
        host = plan.host.peak * per_node
        plans.append(WorldPlan(world, accumulation, plan.device.peak, host, step_s, hours))
    return plans


def _training_flop(job: TrainJob, shapes: Architecture, shape: Shape, *, config: Any, forward: float | None) -> float:
    """FLOPs of one example, forward and backward; config: the module's constructor arguments; forward: if measured."""
    found = objective_of(job).training_flop(config, shape.latent, adapters=job.lora is not None)
    if found is not None:
        return found
    if forward is None:
        alone = job.model_copy(update={"train": job.train.model_copy(update={"micro_batch": 1})})
        forward = micro_batch_pass(alone, shapes, shape, recompute="none").forward_flop
    return TRAINING_PASSES * forward
