"""The first lines of a bundled config: the needs of its job, from its plan.

They are computed without weights and data, for a clip of a stated shape. tools/headers.py writes them into the
files, and a test checks that they are current.
"""

import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from flowmask.data_pipeline.config import source_names
from flowmask.launch.configs import BUNDLED
from flowmask.launch.jobs import CacheJob, EvaluateJob, TrainJob, load_any
from flowmask.launch.plan.cache import CachePlan
from flowmask.launch.plan.evaluate import EvaluatePlan
from flowmask.launch.plan.one_pass import Shape
from flowmask.launch.plan.plan import DEFAULT_GPU, DEFAULT_MFU, CostPlan, plan, speed_of
from flowmask.launch.plan.show import hours, size, work
from flowmask.launch.plan.train import GPUS_GB, TrainPlan

LABELS = ("Hardware", "Cost")
_VIDEO, _IMAGE = Shape(81, 480, 832), Shape(1, 480, 832)  # for evaluations
_IMAGES = ("refcoco",)
_WIDTH, _INDENT = 150, 12


def heads() -> list[Path]:
    """Every bundled config of a cache, training or evaluation; the rows of the paper cost the same as these."""
    files = [path for kind in ("cache", "train", "evaluate") for path in sorted(BUNDLED.rglob(f"{kind}_*.yaml"))]
    return [path for path in files if path.parent.name != "ablation"]


def lines_of(path: Path) -> list[str]:
    """The lines of a config's head; call it where no weights and no data exist."""
    speed = speed_of(gpu=None, tflops=None, mfu=DEFAULT_MFU)
    return lines(plan(path, [], speed=speed, clip=_clip(path)))


def _clip(path: Path) -> Shape | None:
    """The shape for which a config is planned: the size of its cache's bundled config."""
    job, _ = load_any(path, [])
    if isinstance(job, EvaluateJob):
        return _IMAGE if job.data.source in _IMAGES else _VIDEO
    if isinstance(job, TrainJob):
        return max((_made(str(folder)) for folder in job.caches()), key=lambda shape: shape.pixels)
    return None


@lru_cache
def _made(cache: str) -> Shape:
    for path in BUNDLED.glob("cache_*.yaml"):
        job, _ = load_any(path, [])
        assert isinstance(job, CacheJob)
        if str(job.out) == cache:
            clip = job.clip_of(source_names(job.sources)[0])
            return Shape(clip.frames, clip.short_side, clip.long_side)
    raise AssertionError(f"no bundled config makes {cache}")


def lines(found: CostPlan) -> list[str]:
    """The lines of a plan, in the form of the files."""
    return [line for label, said in zip(LABELS, _said(found), strict=True) for line in _wrapped(label, said)]


def _said(found: CostPlan) -> tuple[str, str]:
    if isinstance(found, TrainPlan):
        return _training(found)
    return _cache(found) if isinstance(found, CachePlan) else _evaluation(found)


def _training(found: TrainPlan) -> tuple[str, str]:
    ranks, device = found.chosen.setting.ranks, found.chosen.device.peak
    world = next(world for world in found.worlds if world.world_size == ranks)
    each, a_process = (" on each", " a process") if ranks > 1 else ("", "")
    hardware = f"{ranks} {_gpus(device, ranks)}: {size(device)}{each} with clips of {found.largest}, and "
    hardware += f"{size(found.chosen.host.peak)} of host memory{a_process}."
    again = f", x{found.chosen.slowdown:.2f} by recomputation" if found.chosen.slowdown > 1 else ""
    cost = f"{work(found.flop_per_example)} for such a clip forward and backward{again}; "
    cost += f"{hours(world.step_s / 3600)} a step{_stated(ranks)}. A checkpoint is {size(found.checkpoint_bytes)}."
    return hardware, cost


def _cache(found: CachePlan) -> tuple[str, str]:
    (shape,) = found.shapes
    hardware = f"a {_gpus(found.device_bytes, 1)} for each worker: {size(found.device_bytes)}, and "
    hardware += f"{size(found.host_bytes)} of host memory."
    cost = f"of a clip of {shape} with one mask and one sentence of 15 tokens: VAE {work(found.video_flop)}, UMT5 "
    cost += f"{work(found.text_flop)}, {hours(found.hours)}{_stated(1)}, {size(found.total_bytes)} on the disk."
    return hardware, cost


def _evaluation(found: EvaluatePlan) -> tuple[str, str]:
    hardware = f"a {_gpus(found.device_bytes, 1)}: {size(found.device_bytes)} with a clip of {found.longest}, "
    hardware += f"{size(found.weights_bytes)} of it weights. A video is one clip: memory grows with its frames."
    cost = f"of such a clip and one sentence: {work(found.flop)}, {hours(found.hours)}{_stated(1)}."
    return hardware, cost


def _gpus(needed: float, ranks: int) -> str:
    least = next((gb for gb in GPUS_GB if needed <= gb * 1e9), None)
    kind = f"of more than {GPUS_GB[-1]} GB" if least is None else f"of {least} GB or more"
    return f"GPU{'s' if ranks > 1 else ''} {kind}"


def _stated(ranks: int) -> str:
    gpus = f"{ranks} {DEFAULT_GPU}{'s' if ranks > 1 else ''}"
    return f" on {gpus} at an MFU of {DEFAULT_MFU:g}, which is stated, not measured"


def _wrapped(label: str, said: str) -> Iterator[str]:
    for number, part in enumerate(textwrap.wrap(said, _WIDTH - _INDENT, break_on_hyphens=False)):
        yield f"# {label:<{_INDENT - 2}}{part}" if not number else f"#{' ' * (_INDENT - 1)}{part}"
