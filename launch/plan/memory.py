"""Memory of a rank of a training: the trainer's layout as bytes per trained parameter.

Every coefficient was measured on real ranks (tests/launch/plan/test_plan_memory.py repeats it): some bytes are
whole on each rank, the others are sharded. The memory of a pass of the module comes from models/cost/dry_run.py.
"""

from dataclasses import dataclass, replace
from typing import Literal

from flowmask.models.config import Recompute
from flowmask.trainer.config import STATE_BYTES

Precision = Literal["bf16", "fp32"]

# Of DeepSpeed, configured by trainer/step/engine.py
BUCKET_ELEMENTS = 50_000_000
GATHERED_ELEMENTS = 1_000_000_000  # ZeRO 3 keeps up to this many parameters gathered between forward and backward
PREFETCH_ELEMENTS = 50_000_000

FP32_MOMENTS_BYTES = 8.0
EIGHT_BIT_MOMENTS_BYTES = 2 + 8 / 256  # one code for each moment, and fp32 scales for blocks of 256
CONTEXT_BYTES = 1.5e9  # CUDA's own, NCCL's buffers and the kernels' scratch space: an allowance, not a measurement
FRAGMENTATION = 0.05  # of the rest, lost between the allocator's blocks: an allowance
PROCESS_BYTES = 1.5e9  # one rank of Python, torch and DeepSpeed, without tensors: an allowance


@dataclass(frozen=True)
class Share:
    """Bytes per trained parameter: `whole` on every rank, `shared` over the ranks."""

    whole: float = 0
    shared: float = 0

    def of(self, parameters: float, ranks: int) -> float:
        return parameters * (self.whole + self.shared / ranks)

    def __add__(self, other: "Share") -> "Share":
        return Share(self.whole + other.whole, self.shared + other.shared)


@dataclass(frozen=True)
class Layout:
    """Memory of the engine at one setting.

    held: between two steps; passing: additional peak in a forward or backward pass; stepping: additional peak in the
    optimizer's step; host: for `offload_optimizer`. EMA and snapshots are not included.
    """

    held: Share
    passing: Share
    stepping: Share
    host: Share


def layout(*, zero_stage: int, precision: Precision, offload: bool) -> Layout:
    """Bytes per parameter at one ZeRO stage; offload: the optimizer's state in host memory, from stage 1 on."""
    working = 2 if precision == "bf16" else 4
    none, gradients, shared = Share(), Share(whole=4), Share(shared=4)
    if (
        zero_stage == 0
    ):  # one flat fp32 gradient, the master, two moments; in fp32 the master is also the working weight
        return Layout(Share(whole=16 + (working if precision == "bf16" else 0)), none, none, none)
    if zero_stage == 3:
        state = Share(shared=working) if offload else Share(shared=working + 12 + 4)
        return Layout(state, none, none if offload else shared, Share(shared=20) if offload else none)
    if offload:
        host = Share(shared=12 + 4 + working)  # also a staging copy of the working weights
        if zero_stage == 2 and precision == "fp32":  # the gradients' share stays
            return Layout(Share(working, 4), none, shared, host)
        if zero_stage == 2:
            return Layout(Share(whole=working), shared, Share(shared=4 + working), host)
        rest = shared if precision == "bf16" else none
        return Layout(Share(whole=working), gradients, gradients + rest, host)
    if zero_stage == 2:
        return Layout(Share(working, 12), shared, Share(shared=4 + working), none)
    if precision == "bf16":  # DeepSpeed's BF16_Optimizer keeps fp32 gradients whole
        return Layout(Share(working + 4, 12), Share(whole=2), Share(whole=2), none)
    return Layout(Share(working, 12), gradients, gradients + shared, none)


@dataclass(frozen=True)
class Setting:
    """One way to run: ZeRO stage, offload and number of ranks."""

    zero_stage: int
    precision: Precision = "bf16"
    offload: bool = False
    ranks: int = 1
    recompute: Recompute = "none"
    moments_bytes: float = FP32_MOMENTS_BYTES  # of both moments of a trained parameter

    @property
    def layout(self) -> Layout:
        """Memory of the engine, with the moments in their stored form."""
        found = layout(zero_stage=self.effective_stage, precision=self.precision, offload=self.offload)
        spared = FP32_MOMENTS_BYTES - self.moments_bytes
        less = Share(whole=-spared) if self.effective_stage == 0 else Share(shared=-spared)
        return replace(found, held=found.held + less)

    @property
    def effective_stage(self) -> int:
        """The ZeRO stage in effect: a single process has nothing to shard."""
        return 0 if self.ranks == 1 and not self.offload else self.zero_stage


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one GPU. `peak` is the largest of start, pass and step, with the allowances."""

    states: float  # weights, masters, moments, flat gradients and EMA between two steps
    gradients: float  # additional, at the end of a backward pass
    buffers: float  # DeepSpeed's buckets and gathered parameters
    activations: float  # peak of one forward and backward pass
    start: float  # during the construction of the engine
    working: float  # peak of a training step
    peak: float


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one rank in host memory."""

    offloaded: float
    snapshot: float  # a checkpoint's copies, page-locked, after the first save
    batches: float
    start: float  # the fp32 weights that each rank reads
    peak: float


def device_memory(
    setting: Setting,
    *,
    parameters: float,
    activations: float,
    batch_bytes: float = 0,
    frozen_bytes: float = 0,
    largest: float = 0,
    bucket: float = BUCKET_ELEMENTS,
    gathered: float = GATHERED_ELEMENTS,
    prefetch: float = PREFETCH_ELEMENTS,
    gpu: bool = True,
    ema: bool = True,
) -> DeviceMemory:
    """Memory of one rank.

    parameters: trained ones; activations, batch_bytes: of the micro-batches in memory; largest: elements of
    the largest parameter; gpu: add the allowances, and count buckets twice, because reductions overlap the pass.
    """
    stage, ranks = setting.effective_stage, setting.ranks
    plan = setting.layout
    working = 2 if setting.precision == "bf16" else 4
    states = plan.held.of(parameters, ranks) + frozen_bytes
    if ema and not setting.offload:
        states += 4 * parameters / ranks
    buffers = 0.0
    if stage in (1, 2) and not (stage == 1 and setting.precision == "bf16" and not setting.offload):
        bucket_bytes = 4 if stage == 1 else working
        buffers = min(bucket, parameters) * bucket_bytes if not gpu else bucket * bucket_bytes * 2
    if setting.offload and stage in (1, 2):
        buffers += largest * working
    if stage == 3:
        buffers = bucket * 4 + min(parameters, gathered) * working
    gradients = plan.passing.of(parameters, ranks)
    passing = states + gradients + buffers + activations + batch_bytes
    if stage == 3:
        passing += min(parameters, prefetch) * working  # gathered in addition to its parts
    stepping = states + plan.stepping.of(parameters, ranks) + buffers + batch_bytes
    start = start_bytes(setting, parameters=parameters) + frozen_bytes
    peak = max(passing, stepping, start)
    working_bytes = max(passing, stepping)
    if gpu:
        peak = CONTEXT_BYTES + peak * (1 + FRAGMENTATION)
    return DeviceMemory(states, gradients, buffers, activations + batch_bytes, start, working_bytes, peak)


def start_bytes(setting: Setting, *, parameters: float) -> float:
    """Peak on a device during the engine's construction. For sharded bf16 the fp32 weights stay in host memory."""
    stage, ranks = setting.effective_stage, setting.ranks
    plan = setting.layout
    held = plan.held.of(parameters, ranks)
    if stage == 0:
        return held
    if setting.precision == "bf16":
        return max(held, parameters * (4 + 4 / ranks))  # the weights, DeepSpeed's flat copy, the masters
    return max(held, (4 if stage == 3 else 8) * parameters)


def host_memory(
    setting: Setting, *, parameters: float, batch_bytes: float = 0, module_parameters: float | None = None
) -> HostMemory:
    """Host memory of one rank; batch_bytes: of the batches read ahead; module_parameters: including frozen ones."""
    ranks = setting.ranks
    plan = setting.layout
    offloaded = plan.host.of(parameters, ranks) + (4 * parameters / ranks if setting.offload else 0)
    snapshot = STATE_BYTES * parameters / ranks
    start = 4 * (module_parameters or parameters)
    peak = PROCESS_BYTES + max(start + offloaded, offloaded + snapshot + batch_bytes)
    return HostMemory(offloaded, snapshot, batch_bytes, start, peak)
