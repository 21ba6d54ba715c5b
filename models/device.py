"""The only device of a rank's computation, and the errors if it is missing or its memory is too small.

Nothing else chooses a device. A requested or promised GPU is never replaced by the CPU. Also copies tensors to the
device and back without blocking the host.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from flowmask.models.errors import NO_ROOM, ConfigError

_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in addition to torch.OutOfMemoryError


def rank_device(
    asked: Literal["auto", "cpu", "cuda"] = "auto", *, key: str = "device", exclusive: bool = False
) -> torch.device:
    """The GPU of this local rank, also set as the default of all libraries; "auto": the CPU if there is no GPU.

    Its index is LOCAL_RANK (default 0) among the visible GPUs. A launcher that shows each rank only its own GPU
    (srun --gpus-per-task) makes that one cuda:0. If a node has more ranks than GPUs, ranks share them, which is
    allowed for cache builds and evaluations. `exclusive`: raise ConfigError instead, because NCCL refuses two ranks on
    a GPU. `key` is the config key of `asked`. Raises ConfigError if the requested GPU does not exist.
    """
    if asked == "cuda":
        require_gpu(f"{key} is cuda", otherwise=f"set {key} to cpu or auto")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if exclusive:
        _refuse_sharing(max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), count)
    device = torch.device("cuda", rank % count)
    torch.cuda.set_device(device)
    return device


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block, layers on the CPU are initialised from `seed`; the process's random streams are not changed.

    `torch.manual_seed` would also seed the streams of GPUs, and not restore them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def require_gpu(reason: str, *, otherwise: str) -> None:
    """ConfigError if this process has no GPU.

    reason: the setting that needs one; otherwise: how to run without one.
    """
    if torch.cuda.is_available():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    raise ConfigError(
        f"{reason}, but {os.uname().nodename} shows no usable GPU{shown}; check nvidia-smi there, or {otherwise}"
    )


def use_tf32(on: bool | None) -> None:
    """Set whether fp32 products and convolutions on a GPU use TF32; None: only convolutions, as in torch.

    The only place that sets it. No effect on a CPU.
    """
    torch.backends.cuda.matmul.allow_tf32 = bool(on)
    torch.backends.cudnn.allow_tf32 = on is not False


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor [...] of the host, copied to `device` without waiting for a GPU's earlier work.

    A copy from memory that is not pinned would wait. torch moves a tensor on a device as usual.
    """
    if tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class OnItsWay:
    """Results on the way from a device to the host: a GPU computes and copies them while the host continues."""

    def __init__(self, *results: Tensor, dtype: torch.dtype) -> None:
        """results: [...] each, on one device; on the host they have `dtype`."""
        self._copied: torch.cuda.Event | None = None
        # torch allocates pinned memory for a non-blocking copy from a GPU
        self._results = tuple(result.to(dtype).to("cpu", non_blocking=True) for result in results)
        if results[0].device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def get(self) -> tuple[Tensor, ...]:
        """The results [...] on the host; waits for them, but not for later work of the GPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._results


@contextmanager
def gpu_holds(what: str, *, fix: str) -> Iterator[None]:
    """Inside the block, a GPU's out-of-memory error is a ConfigError that says `what` did not fit, and the `fix`."""
    try:
        yield
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _FULL)
        if not full:
            raise
        raise ConfigError(f"the GPU's {NO_ROOM} {what}; {fix}") from error


def _refuse_sharing(ranks: int, gpus: int) -> None:
    one_shown_to_each = gpus == 1 and "FLOWMASK_PARENT" not in os.environ  # `launch` shows all ranks the same
    if ranks > gpus and not one_shown_to_each:
        raise ConfigError(
            f"{ranks} ranks train on {os.uname().nodename}, which shows {gpus} GPU{'s' * (gpus > 1)}; each rank "
            f"needs its own: set launch.processes_per_node to at most {gpus}"
        )
