"""Attention kernels for tests. They record their arguments and run on any device, built as flash-attn's are:
an autograd function whose forward and backward passes are custom ops with flash-attn's op names.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor

from flowmask.models.config import Attention
from flowmask.models.dit import KERNELS


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v of [B S H D]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@dataclass
class Seen:
    """The calls of one kernel name: shapes of query, key and value, options, and whether the query needs a gradient."""

    shapes: list[tuple[Any, ...]] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    learning: list[bool] = field(default_factory=list)


RAN: list[tuple[Any, ...]] = []  # one entry of shapes for each call of the op


@torch.library.custom_op("flowmask_tests::_flash_attn_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as an op of another library, with the op name that flash-attn uses."""
    RAN.append(tuple(tuple(x.shape) for x in (q, k, v)))
    return exact(q, k, v).contiguous()


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("flowmask_tests::_flash_attn_backward", mutates_args=())
def gradients_of(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    scale = q.shape[-1] ** -0.5
    shares = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).softmax(-1)
    of_shares = torch.einsum("bqhd,bkhd->bhqk", grad, v)
    of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * scale
    return [
        torch.einsum("bhqk,bkhd->bqhd", of_scores, k).contiguous(),
        torch.einsum("bhqk,bqhd->bkhd", of_scores, q).contiguous(),
        torch.einsum("bhqk,bqhd->bkhd", shares, grad).contiguous(),
    ]


@gradients_of.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v)]


class FlashLike(torch.autograd.Function):
    """Built as in flash-attn: a function whose two passes are ops."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        out: Tensor = _forward(q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradients_of(grads[0].contiguous(), *ctx.saved_tensors))


def stand_in(name: Attention, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Replace a backend's function in diffusers' dispatcher by such a kernel."""
    seen = Seen()

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.shapes.append(tuple(tuple(x.shape) for x in (query, key, value)))
        seen.options.append(options)
        seen.learning.append(query.requires_grad)
        out: Tensor = FlashLike.apply(query, key, value)
        return out

    monkeypatch.setitem(_AttentionBackendRegistry._backends, KERNELS[name].backend, attend)
    return seen
