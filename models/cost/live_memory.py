"""Bytes of live tensors, now and at the peak: measured with real operators, or on the meta device.

Counts storages, so views are free and nothing is counted twice. It sees the results of operators, not the scratch
space inside a kernel.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Inside the block, tracks every storage from its first operator to its end; `bytes` and `peak_bytes`.

    imagined: count the tensors of the meta device, in place of all others
    """

    def __init__(self, *, imagined: bool = False) -> None:
        super().__init__()
        self._imagined = imagined
        self.bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(item for item in tree_iter(result) if isinstance(item, torch.Tensor))
        return result

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count existing tensors, of any shape."""
        for tensor in tensors:
            if tensor.is_meta is self._imagined:
                self._note(tensor.untyped_storage())

    def restart_peak(self) -> None:
        """Reset the peak."""
        self.peak_bytes = self.bytes

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self.bytes += size - self._sizes.get(key, 0)  # a storage may have been resized
        self._sizes[key] = size
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)
