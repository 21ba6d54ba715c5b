"""A step asks its device for numbers once, when all of its work is queued; on a GPU each such question is a wait."""

from collections import Counter
from typing import Any

import pytest
import torch
from scenarios import SteepVelocity, Velocity, micro_batches, settings, tiny_dit
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowmask.trainer.step.ema import ShardedEma
from flowmask.trainer.step.engine import Engine

ASKING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"}


class Questions(TorchFunctionMode):
    """Counts by name what brings a tensor's numbers to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.seen[name] += name in ASKING
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Counts the same below Python: scalars that torch itself reads from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", [Velocity, SteepVelocity], ids=["taken", "skipped"])
def test_a_step_of_several_micro_batches_waits_for_its_device_once(objective: type[Velocity], precision: str) -> None:
    engine = Engine(tiny_dit(), train=settings(stage=1, precision=precision))
    ema = ShardedEma(engine, decay=0.9)
    batches = micro_batches(0, micro=2)
    engine.step(Velocity(), batches)
    with Scalars() as scalars, Questions() as questions:
        result = engine.step(objective(), batches, loss_limit=1e9, grad_norm_limit=1e9)
        ema.update()
    assert len(batches) > 1 and result.skipped is (objective is SteepVelocity)
    assert +questions.seen == Counter(tolist=1)
    assert scalars.seen == 0
    engine.close()
