"""Counter-based randomness: every random number is a function of named integers, never of a rank or a history."""

import numpy as np
import torch
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def mix64(*values: int) -> int:
    """Fold integers into one uniform 64-bit integer (splitmix64 finaliser after each value)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def mix64_array(seed: int, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix64(seed, v)` for every v of an array, in one pass; returns uint64 of the same shape."""
    state = np.uint64(mix64(seed))
    golden, m1, m2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
    with np.errstate(over="ignore"):
        x = (values.astype(np.uint64) ^ state) + golden
        x = (x ^ (x >> np.uint64(30))) * m1
        x = (x ^ (x >> np.uint64(27))) * m2
        return x ^ (x >> np.uint64(31))


def generator(key: int) -> torch.Generator:
    """A CPU generator that is a function of `key` alone."""
    return torch.Generator().manual_seed(key & (_MASK >> 1))
