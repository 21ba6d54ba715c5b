"""Pieces of fp32 master weights that this rank holds, under every ZeRO stage, by parameter name.

A fragment is a range of one flattened parameter with its master (a view) and its two Adam moments. The EMA
and the checkpoint depend on nothing else of a stage's memory layout. Only this file reads attributes of
DeepSpeed's optimizers, so only this file must be checked after an upgrade of DeepSpeed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowmask.models.lora import named_parameters
from flowmask.trainer import distributed
from flowmask.trainer.step.optimizer import ArmedAdamW, ReplicatedAdamW

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements start .. start + numel of the flattened parameter `name`.

    master: fp32 [numel], a view
    moment: kind -> fp32 [numel], read from the optimizer each time, because it may store moments in another form
    """

    name: str
    shape: tuple[int, ...]
    start: int
    master: Tensor
    moment: Callable[[str], Tensor]

    @property
    def exp_avg(self) -> Tensor:
        """Adam's mean of the gradient, fp32 [numel]."""
        return self.moment("exp_avg")

    @property
    def exp_avg_sq(self) -> Tensor:
        """Adam's mean of the squared gradient, fp32 [numel]."""
        return self.moment("exp_avg_sq")

    @property
    def numel(self) -> int:
        return self.master.numel()

    def tensors(self) -> dict[str, Tensor]:
        """Master and moments by kind, fp32 [numel] each."""
        return {kind: getattr(self, kind) for kind in KINDS}


def _cut(
    flat: Tensor, optimizer: ArmedAdamW, *, name: str, shape: Sequence[int], start: int, at: int, n: int
) -> Fragment:
    moment = partial(optimizer.moment, flat, at=at, n=n)
    return Fragment(name, tuple(shape), start, flat.detach().narrow(0, at, n), moment)


def replicated(optimizer: ReplicatedAdamW, *, owned: bool) -> list[Fragment]:
    """ZeRO 0: every parameter whole, or (owned) this rank's 1 / world_size of the flat master."""
    first, last = 0, optimizer.master.numel()
    if owned:
        share = -(-last // distributed.world_size())
        first = min(distributed.rank() * share, last)
        last = min(first + share, last)
    pieces = []
    for name, parameter in optimizer.named:
        offset, group = optimizer.offsets[name], optimizer.group_of[name]
        begin, end = max(first, offset), min(last, offset + parameter.numel())
        if begin < end:
            flat, at = optimizer.masters[group], begin - optimizer.starts[group]
            shape, start = parameter.shape, begin - offset
            pieces.append(_cut(flat, optimizer, name=name, shape=shape, start=start, at=at, n=end - begin))
    return pieces


def flat_partition(module: nn.Module, optimizer: ArmedAdamW) -> list[Fragment]:
    """ZeRO 1 and 2: one flat fp32 partition per rank and group; DeepSpeed's `_hp_mapping` maps parts to parameters."""
    flats = [group["params"][0] for group in optimizer.param_groups]
    pieces = []
    for name, parameter in named_parameters(module):
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue
        at, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
        flat = flats[optimizer.group_of[name]]
        shape = parameter.shape
        pieces.append(_cut(flat, optimizer, name=name, shape=shape, start=start, at=at.start, n=at.numel))
    return pieces


def partitioned(module: nn.Module, optimizer: ArmedAdamW, *, zero: Any) -> list[Fragment]:
    """ZeRO 3: every parameter is cut evenly over the ranks; the padding at its end is left out."""
    pieces = []
    parameter: Any  # DeepSpeed adds attributes to it
    for name, parameter in named_parameters(module):
        if not parameter.requires_grad:
            continue
        group, at, share = zero.grad_position[zero.get_param_id(parameter)]
        start = distributed.rank() * share
        held = min(share, parameter.ds_numel - start)
        if held > 0:
            flat = zero.fp32_partitioned_groups_flat[group]
            shape = parameter.ds_shape
            pieces.append(_cut(flat, optimizer, name=name, shape=shape, start=start, at=at, n=held))
    return pieces


def assemble(
    fragments: Sequence[Fragment], values: Sequence[Tensor], *, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Whole fp32 tensors [shape] on rank 0's host memory (an empty dict elsewhere) from every rank's `values`."""
    tensors = whole_tensors(fragments, values, shapes=shapes, everywhere=False)
    return {name: tensor.cpu() for name, tensor in tensors if distributed.rank() == 0}


def whole_tensors(
    fragments: Sequence[Fragment],
    values: Sequence[Tensor],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    everywhere: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and its whole fp32 tensor [shape], on every rank (or correct only on rank 0).

    Bits are added as integers to zeros, so even the sign of a zero survives. One parameter at a time, so a rank needs
    extra memory only for the largest one. Collective: every rank reads all of them.
    """
    mine: dict[str, list[tuple[int, Tensor]]] = {}
    for fragment, value in zip(fragments, values, strict=True):
        mine.setdefault(fragment.name, []).append((fragment.start, value))
    add = distributed.all_reduce_sum if everywhere else distributed.sum_to_rank_zero
    for name, shape in shapes.items():
        buffer = torch.zeros(torch.Size(shape).numel(), device=distributed.device())
        for start, value in mine.get(name, ()):
            buffer.narrow(0, start, value.numel()).copy_(value)
        add(buffer.view(torch.int32))
        yield name, buffer.view(shape)
