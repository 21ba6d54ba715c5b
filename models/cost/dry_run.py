"""The cost of one pass of a module, run on the meta device: real code and sizes, without memory or weights.

A pass of the 1.3B model takes a second on a laptop. It includes everything that the module recomputes or saves, but
not the scratch space inside a GPU's kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from flowmask.models.cost.known_shapes import KnownShapes
from flowmask.models.cost.live_memory import LiveMemory

# torch has no formula for the CPU's fused attention
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Pass:
    """Bytes beyond weights and inputs: kept from forward to backward, and the peak; FLOPs.

    The peak includes one weight's gradient, because gradients are removed when they are computed. `flop` counts
    everything, with recomputation, also that of the attention kernel; `forward_flop` counts only the first pass.
    """

    saved_bytes: float
    peak_bytes: float
    forward_flop: float
    flop: float

    def extended(self, other: "Pass", times: float) -> "Pass":
        """This pass, plus `times` the difference to `other`: cost is linear in depth."""
        mine, more = vars(self), vars(other)
        return Pass(**{name: mine[name] + times * (more[name] - mine[name]) for name in mine})

    def scaled(self, factor: float) -> "Pass":
        """All values times `factor`."""
        return Pass(**{name: value * factor for name, value in vars(self).items()})


def dry_pass(
    module: nn.Module,
    run: Callable[[nn.Module], Tensor],
    *,
    dtype: torch.dtype,
    backward: bool = True,
    like_a_gpu: bool = True,
) -> Pass:
    """Run `run(module)`, a scalar loss (a tensor of any shape without `backward`), on the meta device.

    module: on that device, and useless afterwards; `run` makes its inputs first, on the default device.
    like_a_gpu: RMSNorm is one kernel, as on a GPU, which keeps less; off: as on a CPU.
    """
    with torch.device("meta"), _attention_in_one_kernel():
        materialise(module, dtype)
        if like_a_gpu:
            _fuse_norms(module)
        return measure_pass(module, run, backward=backward)


@contextmanager
def _attention_in_one_kernel() -> Iterator[None]:
    """Inside the block, attention is the CPU's fused kernel; on the meta device torch would take it apart."""
    functional: Any = nn.functional
    dispatched = functional.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        options.pop("enable_gqa", None)  # changes only how heads are shared
        result: Tensor = _CPU_ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, **options)[0]
        return result

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = dispatched


def measure_pass(module: nn.Module, run: Callable[[nn.Module], Tensor], *, backward: bool = True) -> Pass:
    """`dry_pass` of a module with existing tensors, on any device; `run` gives a scalar. Drops each gradient."""
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    imagined = next(module.parameters()).is_meta
    memory, work = LiveMemory(imagined=imagined), _Work()
    memory.add([*module.parameters(), *module.buffers()])
    before = memory.bytes
    with torch.set_grad_enabled(backward), KnownShapes() if imagined else nullcontext(), work, memory:
        result = run(module)
        saved, forward_flop = memory.bytes - before, work.flop
        if backward:
            result.backward()
    for hook in hooks:
        hook.remove()
    return Pass(saved, memory.peak_bytes - before, forward_flop, work.flop)


def materialise(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module empty parameters of `dtype`, and empty buffers of their present dtypes, on the default device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=dtype)
                part._parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Work(TorchDispatchMode):
    """FLOPs by torch's own formulas. Not by its FlopCounterMode: its hooks keep recomputed tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flop += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif packet is _CPU_ATTENTION:
            self.flop += _attention_flop(*args[:3])
        elif packet is _CPU_ATTENTION_BACKWARD:
            self.flop += _attention_flop(*args[1:4]) * 5 // 2  # the scores again, then dV, dP, dQ and dK
        return result


def _attention_flop(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Two products per head; query [B heads S d], key and value [B heads T d]."""
    return 2 * query.numel() * key.shape[-2] * 2


class _FusedRmsNorm(torch.autograd.Function):
    """The GPU's kernel: keeps the input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _fuse_norms(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.RMSNorm) and part.weight is not None:
            part.forward = partial(_fused, part)  # type: ignore[method-assign]


def _fused(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    result: Tensor = _FusedRmsNorm.apply(x, norm.weight)
    return result
