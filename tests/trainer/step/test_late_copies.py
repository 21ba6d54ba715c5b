"""If the GPU forbids a step, nothing moves on the CPU, whose kernel does not wait for copies.

There is no GPU here. Tensors pretend to be on one, and a copy from there that is not waited for has not arrived.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowmask.trainer.step.optimizer import ArmedAdamW

GPU = torch.device("cuda", 0)


class LateGpu(TorchFunctionMode):
    """Tensors from `put`, and results computed from them, pretend to be on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Tensor] = {}

    def put(self, tensor: Tensor) -> Tensor:
        self.held[id(tensor)] = tensor
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(id(value) in self.held for value in args)
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return GPU if there else func(*args, **kwargs)
        if func is torch.Tensor.to and isinstance(args[1], torch.device):
            copy = args[0].clone()
            if args[1] == GPU:
                return self.put(copy)
            return torch.zeros_like(copy) if there and kwargs.get("non_blocking") else copy
        result = func(*args, **kwargs)
        return self.put(result) if there and isinstance(result, Tensor) else result


@pytest.mark.parametrize(
    ("allowed", "norm", "limit"),
    [
        (True, 1.0, math.inf),
        (False, 1.0, math.inf),
        (True, math.nan, math.inf),
        (True, math.inf, 9.0),
        (True, 9.5, 9.0),
    ],
)
def test_an_offloaded_master_moves_only_where_the_gpu_allows_it(allowed: bool, norm: float, limit: float) -> None:
    master = torch.ones(5, requires_grad=True)
    adam = ArmedAdamW([[("w", master)]], lr=0.1, betas=(0.9, 0.999), eps=1e-8, decay=0.0)
    adam.create_state([master])
    master.grad = torch.ones(5)
    with LateGpu() as gpu:
        adam.arm(gpu.put(torch.tensor(allowed)), lambda: gpu.put(torch.tensor(float(norm))), limit=limit)
        adam.step()
        moved = adam.disarm()
    taken = allowed and norm <= limit
    assert moved is not None and bool(moved) == taken
    assert bool((master != 1).all()) == taken and float(adam.state[master]["step"]) == taken
