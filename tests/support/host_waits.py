"""Counts the calls that read numbers from a device. On a GPU, the host waits in each of them."""

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"}


class Questions(TorchFunctionMode):
    """Counts by name the calls that bring a tensor's numbers to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.seen[name] += name in ASKING
        if name == "tensor" and torch.device((kwargs or {}).get("device") or "cpu").type != "cpu":
            self.seen["tensor on a device"] += 1  # torch waits until the tensor is there
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Counts the scalars that torch itself reads from a tensor, below Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
