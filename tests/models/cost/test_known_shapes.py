"""Shapes that are asked for once change nothing: the same results, storages and cost as by torch's own operators."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowmask.models.cost import dry_run, known_shapes
from flowmask.models.cost.dry_run import dry_pass
from flowmask.models.cost.known_shapes import KnownShapes


@dataclass
class Counted(TorchDispatchMode):
    """Counts the operators that reach torch."""

    calls: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.calls += func is not torch.ops.aten.empty_strided.default
        return func(*args, **(kwargs or {}))


def pair(**made: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(4, 6, device="meta", **made), torch.empty(6, 4, device="meta", **made).t()


def facts(value: Any, given: tuple[Tensor, ...]) -> Any:
    """Layout of a result and the inputs whose storage it shares."""
    if isinstance(value, list | tuple):
        return [facts(one, given) for one in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    shared = [number for number, one in enumerate(given) if one.untyped_storage()._cdata == storage._cdata]
    return value.shape, value.stride(), value.dtype, value.storage_offset(), storage.nbytes(), shared


OPERATORS: list[Callable[[Tensor, Tensor], Any]] = [
    *(lambda x, y, by=by: x * by for by in (2, 2.0, True, 2j)),
    *(lambda x, y, dtype=dtype: x.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64)),
    lambda x, y: x + y,
    lambda x, y: x @ y.t(),
    lambda x, y: x == y,
    lambda x, y: x.clone(memory_format=torch.contiguous_format),
    lambda x, y: (x.clone(), y.clone()),
    lambda x, y: torch.cat([x, y, x]),
    lambda x, y: torch.cat([x, y], dim=1),
    lambda x, y: x.sum(dim=0, keepdim=True),
    lambda x, y: torch.var_mean(x.float(), dim=1),
    lambda x, y: x.max(dim=1),
    lambda x, y: y.t().reshape(3, 8),  # views and copies
    lambda x, y: y.reshape(3, 8),
    lambda x, y: torch.ops.aten._unsafe_view(x, [24]),
    lambda x, y: x.expand(2, 4, 6),
    lambda x, y: x.unbind(1),
    lambda x, y: x.mul_(2),
    lambda x, y: torch.where(x > 0, x, y),
    lambda x, y: torch.empty_like(y),
    lambda x, y: torch.nn.functional.pad(x, (1, 2)),
]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KnownShapes, "_known", {})


def test_an_operators_second_result_is_laid_out_and_shares_as_its_first() -> None:
    """All in one process, so that a question taken for another one is found."""
    before = torch.get_default_dtype()
    try:
        for default, dtype in itertools.product((torch.float32, torch.float64), (torch.float32, torch.int32)):
            torch.set_default_dtype(default)
            for number, operator in enumerate(OPERATORS):
                given = pair(dtype=dtype)
                expected = facts(operator(*given), given)
                for _ in range(2):
                    given = pair(dtype=dtype)
                    with KnownShapes():
                        found = operator(*given)
                    assert facts(found, given) == expected, (number, default, dtype)
    finally:
        torch.set_default_dtype(before)


def test_a_shape_is_asked_for_once() -> None:
    x, y = pair()
    seen = []
    for _ in range(2):
        with Counted() as counted, KnownShapes():
            torch.nn.functional.gelu(x + y, approximate="tanh")
        seen.append(counted.calls)
    assert seen[0] == 2 and seen[1] == 0


def test_what_changes_an_argument_or_is_a_part_of_a_larger_storage_is_asked_each_time() -> None:
    x, mean, variance = torch.empty(4, 6, device="meta"), *torch.empty(2, 6, device="meta")
    for _ in range(2):
        with Counted() as counted, KnownShapes():
            torch.ops.aten._native_batch_norm_legit(x, None, None, mean, variance, True, 0.1, 1e-5)
        assert counted.calls
    assert known_shapes._new(torch.empty(10, device="meta")[:5], ()) is None
    assert known_shapes._new(torch.empty(5, device="meta"), ()) is not None


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv3d(8, 4, 3, stride=2))


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)


@pytest.mark.parametrize(("model", "shape"), [(convolutions, (2, 3, 5, 8, 8)), (attention, (2, 7, 16))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_passs_cost_is_that_without(
    model: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost() -> dry_run.Pass:
        return dry_pass(model(), lambda module: module(torch.empty(shape, dtype=dtype)).float().sum(), dtype=dtype)

    found = [cost(), cost()]
    with monkeypatch.context() as patched:
        patched.setattr(dry_run, "KnownShapes", nullcontext)
        expected = cost()
    assert found == [expected, expected] and expected.peak_bytes > expected.saved_bytes > 0
    assert KnownShapes._known
