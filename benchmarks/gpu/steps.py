"""A training step of the trainer itself on a cache of random clips: time, memory beside the plan, waits."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from train_ways import Trainer, inside_a_run

from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.train import GpuSpeed, TrainPlan, plan_training
from flowmask.trainer.run.run_state import Run
from gpu.lab import GB, Lab
from gpu.scale import Precision, Recompute

_PROFILED = 2  # steps
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_ASKED = ("aten::_local_scalar_dense",)  # reads of a tensor's number by Python
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_LONGEST = 8  # number of longest kernels that are named


@dataclass(frozen=True)
class Way:
    """One way to train; the defaults are the plain way."""

    micro_batch: int = 1
    recompute: Recompute = "none"
    compile: bool = False
    attention: str = "native"
    precision: Precision = "bf16"

    @property
    def changes(self) -> int:
        """The number of settings that differ from the plain way."""
        return sum(getattr(self, one.name) != one.default for one in fields(self))

    def __str__(self) -> str:
        compiled = "compiled" if self.compile else "eager"
        return f"{self.precision}, batch {self.micro_batch}, recompute {self.recompute}, {compiled}, {self.attention}"


def job_of(lab: Lab, way: Way) -> TrainJob:
    options = {
        "steps": 1_000_000,
        "global_batch": way.micro_batch,
        "micro_batch": way.micro_batch,
        "activation_checkpointing": way.recompute,
        "compile": way.compile,
        "attention": way.attention,
        "precision": "bf16" if way.precision == "bf16" else "fp32",
        "tf32": None if way.precision == "bf16" else way.precision == "tf32",
    }
    return training(lab, wan=lab.wan, cache=lab.cache, train=options)


def training(lab: Lab, *, wan: Path, cache: Path, train: dict[str, Any], ranks: int = 1) -> TrainJob:
    """A run in a new folder, which saves nothing before its end."""
    return TrainJob.model_validate(
        {
            "out": Path(tempfile.mkdtemp(dir=lab.folder)) / "run",
            "model": {"wan": wan},
            "data": {"cache": cache},
            "train": {"lr": 1e-5, **train},
            "checkpoint": {"every_steps": 1_000_000},
            "tracking": {"enabled": False},
            "launch": {"processes_per_node": ranks},
        }
    )


def step(way: Way, lab: Lab) -> dict[str, Any]:
    """Time of a step, and peak memory since before the engine is built, beside the plan's."""
    job = job_of(lab, way)
    plan = planned(lab, job)
    seconds: list[float] = []
    train(lab, job, lambda run: seconds.append(lab.seconds(Trainer(run).step)))
    work = lab.shares(plan.flop_per_step, seconds[0])
    memory = next(
        one.device for one in plan.settings if one.setting.recompute == way.recompute and not one.setting.offload
    )
    expected = {"planned_tensors_gb": max(memory.start, memory.working) / GB, "planned_gpu_gb": memory.peak / GB}
    return {"step_s": seconds[0], "clips_per_s": way.micro_batch / seconds[0], **work, **lab.memory(), **expected}


def waits(way: Way, lab: Lab) -> dict[str, Any]:
    """The host's work in a step by the profiler, and the part of the step in which the GPU works."""
    found: dict[str, Any] = {}

    def measure(run: Run) -> None:
        take = Trainer(run).step
        plain_s = lab.seconds(take)
        activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * lab.gpu]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(_PROFILED):
                take()
            lab.synchronise()
        events = [_event(seen) for seen in profile.key_averages()]
        found.update(step_s=plain_s, **of_a_step(events, steps=_PROFILED, step_s=plain_s))

    train(lab, job_of(lab, way), measure)
    return found


@dataclass(frozen=True)
class Event:
    """The profiler's entry for one name; kernel: work of the GPU itself, which took `device_us`."""

    name: str
    count: int
    device_us: float
    kernel: bool


def _event(seen: Any) -> Event:
    """An entry of `key_averages`; a range that our code marks is shown on the GPU too, but is no kernel."""
    on_gpu = seen.device_type == torch.autograd.DeviceType.CUDA and not getattr(seen, "is_user_annotation", False)
    return Event(seen.key, seen.count, seen.self_device_time_total, on_gpu)


def of_a_step(events: Iterable[Event], *, steps: int, step_s: float) -> dict[str, Any]:
    """Per step: calls that wait for the GPU by name, copies and launches; the GPU's time as a part of the step without
    a profiler; the longest kernels in ms.
    """
    counts: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    for event in events:
        counts[event.name] += 0 if event.kernel else event.count
        kernels[event.name] += event.device_us if event.kernel else 0
        copies[event.name] += event.count if event.kernel and event.name.startswith("Memcpy") else 0
    calls = {name: counts[name] / steps for name in (*_WAITS, *_ASKED) if counts[name]}
    longest = {name: us / steps / 1e3 for name, us in kernels.most_common(_LONGEST) if us}
    busy = {"gpu_busy_pct": 100 * sum(kernels.values()) / steps / 1e6 / step_s} if longest else {}
    launches = sum(counts[name] for name in _LAUNCHES) / steps
    copied = {name: count / steps for name, count in (+copies).items()}
    return {"waits": calls, "copies": copied, "launches": launches, **busy, "kernels_ms": longest}


def planned(lab: Lab, job: TrainJob) -> TrainPlan:
    """The plan of the job; it covers every recomputation."""
    key = (job.train.micro_batch, job.train.precision)
    if key not in lab.plans:
        lab.plans[key] = plan_training(job, speed=GpuSpeed(1.0, 1.0, "here"))
    return lab.plans[key]


def train(lab: Lab, job: TrainJob, measure: Callable[[Run], object]) -> None:
    """Run `measure` inside a run of the trainer on random weights; RuntimeError if no step was taken."""

    def checked(run: Run) -> None:
        measure(run)
        if run.empty:
            raise RuntimeError(f"no step was taken: {run.last_skip}")

    def build(objective: Any) -> nn.Module:
        module: nn.Module = lab.drawn(objective.blueprint(lab.shapes))
        return module

    inside_a_run(job, checked, build=build)
