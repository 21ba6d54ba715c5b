"""Memory for batches, reused when no tensor uses it: allocating costs as much time as reading into it.

A buffer is free when the last tensor in it dies. Page-locked memory is recycled by torch, which knows when a copy
to the device has ended.
"""

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from math import prod
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 64  # bytes between tensors of one buffer
_KEPT_BYTES = 1 << 28  # free buffers above this are returned to the system
Wanted = Mapping[str, tuple[Sequence[int], torch.dtype]]


class Buffers:
    """Hands out tensors; thread safe. pin: page-locked, for copies to a GPU that don't wait."""

    def __init__(self, *, pin: bool = False):
        self._pin, self._lock = pin, Lock()
        self._free: list[NDArray[np.uint8]] = []
        self._free_bytes = 0
        self._returned: deque[NDArray[np.uint8]] = deque()

    def tensors(self, wanted: Wanted) -> dict[str, Tensor]:
        """Uninitialised tensors of these shapes and dtypes, in one buffer."""
        sizes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in wanted.items()}
        buffer = self._take(sum(_aligned(size) for size in sizes.values()))
        given, start = {}, 0
        for name, (shape, dtype) in wanted.items():
            given[name] = buffer[start : start + sizes[name]].view(dtype).view(tuple(shape))
            start += _aligned(sizes[name])
        return given

    def _take(self, size: int) -> Tensor:
        if self._pin:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        with self._lock:
            self._take_back()
            whole: NDArray[np.uint8] | None = None
            for place in range(len(self._free) - 1, -1, -1):  # the last returned one is in the CPU's cache
                if size <= self._free[place].nbytes <= 2 * size:
                    whole = self._free.pop(place)
                    self._free_bytes -= whole.nbytes
                    break
        whole = np.empty(size, np.uint8) if whole is None else whole
        lent = whole[:size]
        # may be called anywhere, also in a garbage collection, so it must take no lock
        weakref.finalize(lent, self._returned.append, whole).atexit = False
        return torch.from_numpy(lent)

    def _take_back(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
            self._free_bytes += self._free[-1].nbytes
        while self._free_bytes > _KEPT_BYTES:
            self._free_bytes -= self._free.pop(0).nbytes


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
