"""AdamW that moves only on command, and the replicated (ZeRO 0) form of it with flat fp32 masters.

DeepSpeed calls `step` at times of its own (once inside `initialize`), and ZeRO wraps whatever it is given. So
the permission to move lives here, at the innermost place: an optimizer that is not armed changes nothing, at
any stage.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from trainer import distributed

NamedTensors = list[tuple[str, Tensor]]
_NORM_CHUNK = 1 << 24  # elements that are widened to float64 at a time
_ALIGN = 64  # elements; keeps every parameter's view as aligned as an allocation of its own


def decay_groups(named: NamedTensors, *, exclude: Literal["none", "norms_biases"]) -> list[NamedTensors]:
    """All parameters in one group, or those whose weights decay and, apart, biases and scales of norms."""
    if exclude == "none":
        return [named]
    spared = {name for name, p in named if p.ndim <= 1 or name.endswith((".bias", ".gamma"))}
    decaying = [(name, p) for name, p in named if name not in spared]
    return [decaying, [(name, p) for name, p in named if name in spared]]


class ArmedAdamW(torch.optim.AdamW):
    """torch's fused AdamW whose `step` does nothing unless armed and the gradients are as they should be."""

    def __init__(
        self,
        groups: Sequence[NamedTensors],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decay: float,
    ):
        """groups: of `decay_groups`; only the first one's weights decay."""
        self.group_of = {name: number for number, group in enumerate(groups) for name, _ in group}
        params = [
            {"params": [tensor for _, tensor in group], "weight_decay": 0.0 if number else decay}
            for number, group in enumerate(groups)
        ]
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self._norm: Callable[[], Tensor] | None = None
        self._limit = math.inf
        self._moved = False

    def arm(self, norm: Callable[[], Tensor], *, limit: float = math.inf) -> None:
        """Allow the coming step, if `norm()`, the gradients' global norm, is then finite and within `limit`."""
        self._norm, self._limit, self._moved = norm, limit, False

    def disarm(self) -> bool:
        """Forbid steps again; whether one was taken since `arm`."""
        moved, self._norm, self._moved = self._moved, None, False
        return moved

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, if allowed."""
        if self._norm is None:
            return
        norm = float(self._norm())
        if math.isfinite(norm) and norm <= self._limit:
            super().step()
            self._moved = True

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.param_groups:
            group["lr"] = lr

    def create_state(self, masters: list[Tensor]) -> None:
        """Zero moments and step count for `masters` now: a checkpoint may come before the first step."""
        for master in masters:
            self.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def set_step_count(self, steps: int) -> None:
        """Adam's own step number, which decides its bias correction."""
        for state in self.state.values():
            state["step"].fill_(float(steps))


class ReplicatedAdamW(ArmedAdamW):
    """ZeRO 0: every rank holds one flat fp32 master, one flat fp32 gradient and both moments.

    The module's parameters become views of a flat working buffer (the master itself in fp32) and their
    gradients views of the flat fp32 gradient, so micro-batches accumulate in fp32 whatever the working
    precision, and the reduction, the norm, the clipping and the update are one kernel each. A parameter that
    a step does not use counts as one with a zero gradient, as in the ZeRO stages.
    """

    def __init__(
        self,
        groups: Sequence[NamedTensors],
        *,
        working_dtype: torch.dtype,
        grad_clip: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decay: float,
    ):
        self.named = [pair for group in groups for pair in group]
        self.offsets: dict[str, int] = {}
        self.starts: list[int] = []
        total = 0
        for group in groups:
            self.starts.append(total)
            for name, parameter in group:
                self.offsets[name] = total
                total += -(-parameter.numel() // _ALIGN) * _ALIGN
        where = self.named[0][1].device
        self.master = torch.zeros(total, device=where)
        self.gradient = torch.zeros(total, device=where)
        same = working_dtype == torch.float32
        self.working = self.master if same else torch.zeros(total, dtype=working_dtype, device=where)
        for name, parameter in self.named:
            self._view(self.master, name, parameter).copy_(parameter.data)
            parameter.data = self._view(self.working, name, parameter)
            parameter.grad_dtype = torch.float32
        self.grad_clip = grad_clip
        self._global_grad_norm = torch.zeros((), device=where)
        self.masters = self._by_group(self.master)
        flat = [[(name, master) for name, _ in group] for group, master in zip(groups, self.masters)]
        super().__init__([group[:1] for group in flat], lr=lr, betas=betas, eps=eps, decay=decay)
        self.group_of = {name: number for number, group in enumerate(flat) for name, _ in group}
        self.publish()

    def _by_group(self, flat: Tensor) -> list[Tensor]:
        ends = [*self.starts[1:], flat.numel()]
        return [flat[start:end] for start, end in zip(self.starts, ends, strict=True)]

    def _view(self, flat: Tensor, name: str, parameter: Tensor) -> Tensor:
        return flat.narrow(0, self.offsets[name], parameter.numel()).view(parameter.shape)

    def attach_gradients(self) -> None:
        """Zero the flat gradient and lend its views to the parameters for the next backward passes."""
        self.gradient.zero_()
        for name, parameter in self.named:
            parameter.grad = self._view(self.gradient, name, parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Average over ranks, measure, clip, update; a non-finite norm leaves everything as it was."""
        if distributed.world_size() > 1:
            distributed.all_reduce_sum(self.gradient).div_(distributed.world_size())
        norm = precise_norm(self.gradient)
        self._global_grad_norm = norm  # where DeepSpeed looks for it
        if self.grad_clip > 0:
            self.gradient.mul_(1.0 / torch.clamp((norm + 1e-6) / self.grad_clip, min=1.0))
        for master, gradient in zip(self.masters, self._by_group(self.gradient), strict=True):
            master.grad = gradient
        super().step()
        self.publish()

    def publish(self) -> None:
        """Copy the masters to the working weights."""
        if self.working is not self.master:
            self.working.copy_(self.master)


def precise_norm(flat: Tensor) -> Tensor:
    """Euclidean norm of a flat fp32 tensor, summed in float64; returns an fp32 scalar.

    One fp32 sum over a million elements was off by 7e-5 on a CPU, which clipping carries into the training.
    """
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in flat.split(_NORM_CHUNK)]
    return torch.linalg.vector_norm(torch.stack(parts)).float()
