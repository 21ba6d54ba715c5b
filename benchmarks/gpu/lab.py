"""Shared by all rows: the device, modules with random weights on it, clocks, memory, and shares of the peak.

Modules are those of `flowmask plan`, made on the meta device and filled on the GPU: no file, no host copy.
"""

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from synthetic_cache import write_cache
from torch import nn

from flowmask.launch.plan.encoders import Encoders
from flowmask.launch.plan.model import Architecture, architecture
from flowmask.launch.plan.one_pass import Shape
from flowmask.models.device import rank_device
from flowmask.models.weights.tiny_wan import write_tiny_wan
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.track.meters import peak_tflops
from gpu.scale import TINY, Scale

GB = 1e9
_ROUNDS = 3


@dataclass
class Lab:
    """folder: a temporary folder. matrix_tflops: the rate of the largest bf16 product here, once its row is done."""

    scale: Scale
    folder: Path
    asked: Any = "cuda"
    matrix_tflops: float | None = None
    device: torch.device = field(init=False)
    plans: dict[Any, Any] = field(default_factory=dict)  # plans of trainings

    def __post_init__(self) -> None:
        self.device = rank_device(self.asked, key="--device")
        write_tiny_wan(self.tiny_wan)
        self.wan.mkdir(exist_ok=True)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def tiny_wan(self) -> Path:
        """A whole Wan folder; every scale uses its tokenizer."""
        return self.folder / "tiny"

    @property
    def wan(self) -> Path:
        return self.folder / self.scale.wan

    @cached_property
    def shapes(self) -> Architecture:
        return architecture(self.wan)

    @cached_property
    def encoders(self) -> Encoders:
        """Costs of the frozen parts."""
        return Encoders(self.shapes)

    @property
    def clip(self) -> Shape:
        return Shape(*self.scale.clip)

    @property
    def dit_config(self) -> dict[str, Any]:
        """The config for training: with the injected video."""
        return {**self.shapes.dit_config, "in_channels": 32, "out_channels": 16}

    @cached_property
    def cache(self) -> Path:
        """A cache of random clips."""
        return self._cache("cache", self.scale, wan=self.wan)

    @cached_property
    def tiny_cache(self) -> Path:
        """A cache that fits the tiny Wan."""
        return self.cache if self.scale is TINY else self._cache("tiny_cache", TINY, wan=self.tiny_wan)

    def _cache(self, name: str, scale: Scale, *, wan: Path) -> Path:
        folder, shape = self.folder / name, Shape(*scale.clip)
        width = architecture(wan).dit_config["text_dim"]
        stats = WanFolder(wan).latent_stats()
        write_cache(folder, clips=24, latent=(16, *shape.latent), shape=scale.clip, text_dim=width, stats=stats)
        return folder

    def drawn(self, module: Any, dtype: torch.dtype = torch.float32) -> Any:
        """Move a module from the meta device to this one, with random weights that keep numbers near 1."""
        nn.Module.to(module, dtype)
        module.to_empty(device=self.device)
        if hasattr(module, "tie_weights"):
            module.tie_weights()
        with torch.no_grad():
            for name, tensor in module.named_parameters():
                if tensor.ndim > 1 and tensor[0].numel() > 1:
                    tensor.normal_(std=1 / math.sqrt(tensor[0].numel()))
                else:
                    tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        return module

    def shares(self, flop: float, seconds: float) -> dict[str, float | None]:
        """The share of this GPU's stated peak, and of the matrix rate measured here, for `flop` in `seconds`."""
        name = torch.cuda.get_device_name(self.device) if self.gpu else None
        return shares(flop, seconds, peak_tflops=peak_tflops(name), matrix_tflops=self.matrix_tflops)

    def seconds(self, work: Callable[[], object], *, warm: int = 2) -> float:
        """Seconds of one call, the median of three blocks without a wait inside, after `warm` calls."""
        for _ in range(warm):
            work()
        one = self._block(work, 1)
        length = max(1, min(20, int(self.scale.within_s / _ROUNDS / one)))
        return statistics.median(self._block(work, length) for _ in range(_ROUNDS))

    def _block(self, work: Callable[[], object], length: int) -> float:
        self.synchronise()
        began = time.perf_counter()
        for _ in range(length):
            work()
        self.synchronise()
        return (time.perf_counter() - began) / length

    def synchronise(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Free the tensors of the last row, and reset the peak."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # else its programs keep modules alive, and later compilations hit its limit
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
        self._before = self.held()

    def held(self) -> int:
        """Bytes of tensors on the GPU, or resident bytes on the host."""
        return torch.cuda.memory_allocated(self.device) if self.gpu else _resident("VmRSS")

    def memory(self) -> dict[str, float]:
        """Peak GB since `clear`: of tensors and of the allocator; and the GB of the whole GPU now."""
        if not self.gpu:
            return {"peak_gb": (_resident("VmHWM") - self._before) / GB}
        free, total = torch.cuda.mem_get_info(self.device)
        peak, kept = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return {"peak_gb": peak / GB, "reserved_gb": kept / GB, "gpu_gb": (total - free) / GB}


def shares(
    flop: float, seconds: float, *, peak_tflops: float | None, matrix_tflops: float | None
) -> dict[str, float | None]:
    """TFLOP/s, and percent of a stated peak (MFU) and of a measured rate, where they are known."""
    reached = flop / seconds / 1e12
    of = {"mfu_pct": peak_tflops, "of_matrix_pct": matrix_tflops}
    return {"tflop_per_s": reached, **{name: 100 * reached / rate if rate else None for name, rate in of.items()}}


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10
