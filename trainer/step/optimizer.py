"""AdamW that updates only when armed, and its replicated (ZeRO 0) form with flat fp32 masters.

DeepSpeed calls `step` at other times too (once inside `initialize`), and ZeRO wraps the given optimizer. So
the permission to update is at the innermost place: at any stage, an optimizer that is not armed changes
nothing. The device decides whether the gradients allow a step: nothing here waits for it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from flowmask.trainer import distributed

NamedTensors = list[tuple[str, Tensor]]  # names and parameters of any shape
_NORM_ROW = 256  # elements summed in fp32; these sums are added in float64
_ALIGN = 64  # elements; aligns every parameter's view like a separate allocation


def decay_groups(named: NamedTensors, *, exclude: Literal["none", "norms_biases"]) -> list[NamedTensors]:
    """All parameters in one group; or two: with decay, then biases and scales of norms, without decay."""
    if exclude == "none":
        return [named]
    spared = {name for name, p in named if p.ndim <= 1 or name.endswith((".bias", ".gamma"))}
    decaying = [(name, p) for name, p in named if name not in spared]
    return [decaying, [(name, p) for name, p in named if name in spared]]


class ArmedAdamW(torch.optim.AdamW):
    """torch's fused AdamW whose `step` does nothing unless it is armed and the gradients are good."""

    def __init__(
        self, groups: Sequence[NamedTensors], *, lr: float, betas: tuple[float, float], eps: float, decay: float
    ):
        """groups: of `decay_groups`; only the first one's weights decay."""
        self.group_of = {name: number for number, group in enumerate(groups) for name, _ in group}
        params = [
            {"params": [tensor for _, tensor in group], "weight_decay": 0.0 if number else decay}
            for number, group in enumerate(groups)
        ]
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self._allowed: Tensor | None = None
        self._norm: Callable[[], Tensor] = lambda: torch.zeros(())
        self._limit = math.inf
        self._moved: Tensor | None = None

    def arm(self, allowed: Tensor, norm: Callable[[], Tensor], *, limit: float = math.inf) -> None:
        """Allow the next step to update if `allowed` (bool scalar) is true and the gradients' norm is good.

        norm: returns their global norm when called; good means finite and at most `limit`.
        """
        self._allowed, self._norm, self._limit, self._moved = allowed, norm, limit, None

    def disarm(self) -> Tensor | None:
        """Forbid steps again; returns whether one was taken since `arm`: a bool scalar on the device, None for no."""
        moved, self._allowed, self._moved = self._moved, None, None
        return moved

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, if allowed; the kernel itself skips a forbidden one."""
        if self._allowed is None:
            return
        norm = self._norm().to(self._allowed.device)
        self._moved = self._allowed & torch.isfinite(norm) & (norm.double() <= self._limit)
        self._update(self._moved)

    def _update(self, moved: Tensor) -> None:
        # Inputs of torch's fused kernel that were made for gradient scalers. Here they are copied to the masters'
        # device by a copy that waits. Torch's own copy does not wait, so a CPU kernel would read them before they
        # arrive from the GPU. ZeRO 3 steps one part of the masters at a time, and leaves the other groups empty.
        master: Tensor = next(master for group in self.param_groups for master in group["params"])
        self.found_inf = (~moved).float().to(master.device)
        super().step()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.param_groups:
            group["lr"] = lr

    def create_state(self, masters: list[Tensor]) -> None:
        """Zero moments and step count for `masters` fp32 [n] now: a checkpoint may come before the first step."""
        for master in masters:
            self.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def set_step_count(self, steps: int) -> None:
        """Adam's step number, which decides its bias correction."""
        for state in self.state.values():
            state["step"].fill_(float(steps))

    def moment(self, master: Tensor, kind: str, *, at: int, n: int) -> Tensor:
        """Elements at .. at + n of a flat master's `kind` of moment: a view, fp32 [n]."""
        whole: Tensor = self.state[master][kind]
        return whole.detach().narrow(0, at, n)

    def open_moments(self) -> None:
        """Make the tensors from `moment` writable until `close_moments`; here they always are."""

    def close_moments(self) -> None:
        """Store the moments written since `open_moments`."""


class ReplicatedAdamW(ArmedAdamW):
    """ZeRO 0: every rank holds one flat fp32 master, one flat fp32 gradient and both moments.

    The module's parameters become views of a flat working buffer (the master itself in fp32). Each gradient is
    added to the flat one as soon as the backward pass has computed it. So micro-batches accumulate in fp32 at any
    working precision, and reduction, norm and update are one kernel each. A parameter that a step does not use
    has a zero gradient, as in the ZeRO stages.
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
            parameter.register_post_accumulate_grad_hook(partial(self._take_gradient, name))
        self._arrived: set[str] = set()
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

    def expect_gradients(self) -> None:
        """Discard the gradients of the last step before new backward passes."""
        self._arrived.clear()

    @torch.no_grad()
    def _take_gradient(self, name: str, parameter: Tensor) -> None:
        """Add a gradient to the flat ones, in fp32; the first one of a step overwrites."""
        assert parameter.grad is not None
        place = self._view(self.gradient, name, parameter)
        if name in self._arrived:
            place.add_(parameter.grad)
        else:
            place.copy_(parameter.grad)
        self._arrived.add(name)
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Average over ranks, measure, clip, update; a non-finite norm changes nothing."""
        for name, parameter in self.named:
            if name not in self._arrived:
                self._view(self.gradient, name, parameter).zero_()
        if distributed.world_size() > 1:
            distributed.all_reduce_sum(self.gradient).div_(distributed.world_size())
        norm = precise_norm(self.gradient)
        self._global_grad_norm = norm  # DeepSpeed reads it here
        if self.grad_clip > 0:
            self.grad_scale = torch.clamp((norm + 1e-6) / self.grad_clip, min=1.0)  # the kernel divides by it
        for master, gradient in zip(self.masters, self._by_group(self.gradient), strict=True):
            master.grad = gradient
        super().step()
        self.publish()

    def publish(self) -> None:
        """Copy the masters to the working weights."""
        if self.working is not self.master:
            self.working.copy_(self.master)


def precise_norm(flat: Tensor) -> Tensor:
    """Euclidean norm of a flat fp32 tensor, summed in float64 over short rows; returns an fp32 scalar.

    One fp32 sum over a million elements was wrong by 7e-5 on a CPU, and clipping would carry this error into the
    training. Rows are within 1e-7 of a full float64 sum, which takes ten times as long.
    """
    whole = flat.numel() // _NORM_ROW * _NORM_ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:]).view(1)
    return torch.linalg.vector_norm(torch.cat([rows, rest]), dtype=torch.float64).float()
