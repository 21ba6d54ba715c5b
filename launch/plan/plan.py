"""`flowmask plan`: estimates memory, time and disk space of a job of any kind, before a GPU is requested.

Loads no weights and writes nothing. Assumptions for missing folders are in `notes`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flowmask.launch.jobs import CacheJob, EvaluateJob, TrainJob, load_any
from flowmask.launch.plan.cache import CachePlan, plan_cache
from flowmask.launch.plan.evaluate import EvaluatePlan, plan_evaluation
from flowmask.launch.plan.failures import STATED, Cluster
from flowmask.launch.plan.one_pass import Shape
from flowmask.launch.plan.train import GPUS_GB, GpuSpeed, TrainPlan, plan_training
from flowmask.models.errors import ConfigError
from flowmask.trainer.track.meters import known_gpus, peak_tflops

CostPlan = TrainPlan | CachePlan | EvaluatePlan
DEFAULT_GPU, DEFAULT_MFU = "H100", 0.4


def plan(
    config: Path, overrides: Sequence[str], *, speed: GpuSpeed, clip: Shape | None = None, cluster: Cluster = STATED
) -> CostPlan:
    """The plan of a config of any kind; raises UserError for a config that could not run."""
    job, _ = load_any(config, overrides)
    if isinstance(job, TrainJob):
        if job.tracking.peak_tflops is not None and speed.gpu == DEFAULT_GPU:
            speed = replace(speed, tflops=job.tracking.peak_tflops, gpu="tracking.peak_tflops")
        return plan_training(job, speed=speed, clip=clip, cluster=cluster)
    if isinstance(job, CacheJob):
        return plan_cache(job, speed=speed)
    assert isinstance(job, EvaluateJob)
    return plan_evaluation(job, speed=speed, clip=clip)


def speed_of(*, gpu: str | None, tflops: float | None, mfu: float) -> GpuSpeed:
    """The assumed speed: a GPU by name or its peak, and the MFU."""
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu is {mfu:g}; it must be above 0 and at most 1, for example {DEFAULT_MFU}")
    if tflops is not None:
        if not 0 < tflops < math.inf:
            raise ConfigError(f"--tflops is {tflops:g}; it must be above 0 and finite")
        return GpuSpeed(tflops, mfu, gpu or "the stated GPU")
    name = gpu or DEFAULT_GPU
    peak = peak_tflops(name)
    if peak is None:
        raise ConfigError(f"--gpu is {name!r}; known: {', '.join(known_gpus())}. Or give its peak: --tflops")
    return GpuSpeed(peak, mfu, name)


def cluster_of(*, node_mtbf_h: float, restart_min: float) -> Cluster:
    """The assumed cluster."""
    if not 0.001 <= node_mtbf_h <= 1e9:
        raise ConfigError(f"--node-mtbf-h is {node_mtbf_h:g}; it must be from 0.001 to 1e9 hours")
    if not 0 <= restart_min <= 1e6:
        raise ConfigError(f"--restart-min is {restart_min:g}; it must be from 0 to 1e6 minutes")
    return Cluster(node_mtbf_h, restart_min)


def clip_of(text: str | None) -> Shape | None:
    """FRAMESxHEIGHTxWIDTH as a shape."""
    if text is None:
        return None
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
        raise ConfigError(f"--clip is {text!r}; it must be FRAMESxHEIGHTxWIDTH, for example 17x480x832")
    frames, height, width = map(int, sizes)
    if frames % 4 != 1 or not height or height % 16 or not width or width % 16:
        raise ConfigError(f"--clip is {text}; frames must be 4k + 1, height and width multiples of 16 px")
    return Shape(frames, height, width)


def to_json(found: CostPlan) -> dict[str, Any]:
    """Every number of a plan, in bytes, FLOPs, seconds and hours."""
    facts = asdict(found)
    if not isinstance(found, TrainPlan):
        kind = "cache" if isinstance(found, CachePlan) else "evaluate"
        return {"job": kind, **facts}
    best = {str(gb): found.fits(gb) for gb in GPUS_GB}
    return {"job": "train", **facts, "fits_gb": {gb: asdict(s.setting) if s else None for gb, s in best.items()}}
