"""Counter-based randomness: every random number is a function of named integers, never of a rank or a history."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# float32 rounds the 65 lowest integers to u = 0, whose logarithm is infinite. Their exact values are (0.5 .. 64.5) /
# 2^32; this is the mean. The next u in float32 is 2^-25, so no other number changes.
_SMALLEST_U = 32.5 * 2.0**-32


def mix64(*values: int) -> int:
    """Fold integers into one uniform 64-bit integer (splitmix64 finaliser after each value)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def uniform(key: int, *, number: int = 0) -> float:
    """The `number`th uniform float64 in [0, 1) of a key: the upper 53 bits of `mix64(key, number)`."""
    return (mix64(key, number) >> 11) * 2.0**-53


def mix64_array(seed: int, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix64(seed, v)` for every v of `values`, in one pass; returns uint64 of the same shape."""
    state = np.uint64(mix64(seed))
    golden, m1, m2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
    with np.errstate(over="ignore"):
        x = (values.astype(np.uint64) ^ state) + golden
        x = (x ^ (x >> np.uint64(30))) * m1
        x = (x ^ (x >> np.uint64(27))) * m2
        return x ^ (x >> np.uint64(31))


def normal(key: int, shape: Sequence[int], device: "torch.device | str" = "cpu") -> "Tensor":
    """Standard normal numbers, float32 of `shape`, that are a function of `key` alone on any device.

    Numbers 2i and 2i + 1 are Box-Muller's of the 64 bits mix(key + i * golden). The integer arithmetic is equal to the
    bit on all devices; log, sin and cos round as the device does (1e-6).
    """
    import torch

    count = math.prod(shape)
    bits = torch.arange(1, (count + 1) // 2 + 1, device=device)
    bits.mul_(_signed(_GOLDEN)).add_(_signed(key))
    for shift, factor in ((30, _FACTORS[0]), (27, _FACTORS[1]), (31, 1)):
        bits ^= (bits >> shift) & ((1 << (64 - shift)) - 1)  # int64 shifts copy the sign: mask it off
        bits *= _signed(factor)
    return box_muller(bits).flatten()[:count].view(tuple(shape))


def box_muller(bits: "Tensor") -> "Tensor":
    """Two standard normal numbers, float32 [2 n], of each uniform 64-bit word, int64 [n]; finite for every word.

    The lower half is the radius' u, the upper half the angle.
    """
    import torch

    halves = bits.view(torch.int32).view(-1, 2).to(torch.float32)
    u = halves[:, 0].add(2.0**31 + 0.5).mul_(2.0**-32).clamp_(min=_SMALLEST_U, max=1)
    radius = u.log_().mul_(-2).sqrt_()
    angle = halves[:, 1] * (2 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()])


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def generator(key: int) -> "torch.Generator":
    """A CPU generator that is a function of `key` alone."""
    import torch

    return torch.Generator().manual_seed(key & (_MASK >> 1))
