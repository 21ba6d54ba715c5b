"""Laws of the random numbers: functions of their key alone, with the stated distribution."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from trials import SEED, TRIALS

from flowmask.data_pipeline.randomness import box_muller, mix64, mix64_array, normal

LOWEST, HIGHEST = -(2**31), 2**31 - 1
EDGES = [*range(LOWEST, LOWEST + 400), *range(-300, 300), *range(HIGHEST - 400, HIGHEST + 1)]


def words(low: Tensor, high: Tensor) -> Tensor:
    """The 64-bit words, int64, with these halves (int32 values in any integer type)."""
    return torch.stack([low.to(torch.int32), high.to(torch.int32)], dim=-1).contiguous().view(torch.int64)[:, 0]


def unclamped(bits: Tensor) -> Tensor:
    """The formula of older versions, which gave inf or nan where u is 0."""
    halves = bits.view(torch.int32).view(-1, 2).to(torch.float32)
    radius = halves[:, 0].add(2.0**31 + 0.5).mul_(2.0**-32).clamp_(max=1).log_().mul_(-2).sqrt_()
    angle = halves[:, 1] * (2 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])


class Moments:
    """Sums over a sample, and its distance from the normal law in standard errors."""

    def __init__(self) -> None:
        self.count, self.sums = 0, [0.0] * 6

    def add(self, drawn: Tensor) -> None:
        square = drawn.square()
        powers = [float(x.sum(dtype=torch.float64)) for x in (drawn, square, drawn * square, square.square())]
        beyond = [int((square > limit**2).sum()) for limit in (4, 5)]
        self.sums = [a + b for a, b in zip(self.sums, (*powers, *beyond), strict=True)]
        self.count += drawn.numel()

    def errors(self) -> Sequence[float]:
        """Mean, variance, skewness, kurtosis, share beyond 4 and 5 sigma, less those of the law, in standard errors."""
        shares = [math.erfc(limit / 2**0.5) for limit in (4, 5)]
        law = (0, 1, 0, 3, *shares)
        variances = (1, 2, 15, 96, *(share * (1 - share) for share in shares))
        return [
            (total / self.count - expected) / (variance / self.count) ** 0.5
            for total, expected, variance in zip(self.sums, law, variances, strict=True)
        ]


def test_every_edge_of_both_halves_gives_finite_numbers() -> None:
    edges = torch.tensor(EDGES)
    low, high = edges.repeat_interleave(len(EDGES)), edges.repeat(len(EDGES))
    assert box_muller(words(low, high)).isfinite().all()


def test_the_lowest_integers_stand_for_the_mean_of_their_exact_values_and_fall_in_line_with_the_next() -> None:
    low = torch.arange(LOWEST, LOWEST + 400)
    radius = box_muller(words(low, torch.zeros(400)))[0].double()
    zeros = ~unclamped(words(low, torch.zeros(400)))[:400].isfinite()
    exact = ((low[zeros] - LOWEST).double() + 0.5).mean() * 2.0**-32
    assert int(zeros.sum()) == 65
    assert radius[zeros].tolist() == pytest.approx([float((-2 * exact.log()).sqrt())] * 65, rel=1e-6)
    assert (radius.diff() <= 0).all()


def test_numbers_that_were_finite_in_older_runs_are_the_same_to_the_bit() -> None:
    edges = words(torch.tensor(EDGES), torch.tensor(EDGES).flip(0))
    drawn = torch.from_numpy(mix64_array(3, np.arange(200_000, dtype=np.uint64)).view(np.int64))
    for bits in (edges, drawn, drawn[:7]):
        old, new = unclamped(bits), box_muller(bits).flatten()
        assert torch.equal(old.view(torch.int32)[old.isfinite()], new.view(torch.int32)[old.isfinite()])


def test_mean_variance_kurtosis_and_tails_are_those_of_the_normal_law() -> None:
    """Within 5 standard errors for 16 million numbers; 1000 of them are expected beyond 4 sigma."""
    moments = Moments()
    for i in range(16):
        moments.add(normal(mix64(2, i), (1_000_000,)))
    assert max(map(abs, moments.errors())) < 5, moments.errors()


@pytest.mark.long
def test_all_values_of_both_halves_give_finite_numbers_with_the_moments_and_tails_of_the_normal_law() -> None:
    """Every radius and every angle once, paired by an odd factor; 5 standard errors of a random sample of this size.

    Below TRIALS=8, only every eighth (TRIALS=1), fourth or second radius.
    """
    torch.set_num_threads(1)
    moments, chunk = Moments(), 1 << 15  # fits a core's cache: twice as fast
    finite = torch.tensor(True)
    apart = max(1, 8 // TRIALS)
    for first in range(LOWEST + SEED % apart, HIGHEST + 1, apart * chunk):
        low = torch.arange(first, first + apart * chunk, apart)
        drawn = box_muller(words(low, low * 0x9E3779B1))
        finite &= drawn.isfinite().all()
        moments.add(drawn)
    assert finite and moments.count == 2**33 // apart
    assert max(map(abs, moments.errors())) < 5, moments.errors()


def test_normal_numbers_are_the_splitmix64_stream_of_their_key_through_box_muller():
    """The same numbers computed slowly, with Python's integers and floats."""
    key, count = mix64(5), 7
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    cos, sin = [], []
    for i in range(1, count // 2 + 2):
        x = (key + i * golden) & mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        x ^= x >> 31
        low, high = (int(v) for v in np.array([x], np.uint64).view(np.int32))
        radius = math.sqrt(-2 * math.log((low + 2**31 + 0.5) / 2**32))
        cos.append(radius * math.cos(2 * math.pi * high / 2**32))
        sin.append(radius * math.sin(2 * math.pi * high / 2**32))
    assert normal(key, (count,)).tolist() == pytest.approx([*cos, *sin][:count], abs=1e-5)


def test_normal_numbers_are_normal_and_apart_for_every_key():
    drawn = torch.stack([normal(mix64(1, i), (16, 25, 63)) for i in range(40)]).double()
    flat = drawn.flatten()
    spread = flat.numel() ** -0.5
    moments = [(flat**power).mean() for power in (1, 2, 3, 4)]
    for moment, expected, width in zip(moments, (0, 1, 0, 3), (1, 2**0.5, 15**0.5, 96**0.5), strict=True):
        assert abs(moment - expected) < 5 * width * spread
    assert 4.2 < flat.abs().max() < 6.8 and flat.isfinite().all()
    below = (flat < -1.96).double().mean()
    assert abs(below - 0.025) < 5 * 0.16 * spread
    correlation = torch.corrcoef(drawn.flatten(1)).fill_diagonal_(0).abs().max()
    assert correlation < 6 * drawn[0].numel() ** -0.5
    halves = flat[: flat.numel() // 2 * 2].view(2, -1)
    assert torch.corrcoef(halves)[0, 1].abs() < 5 * halves.shape[1] ** -0.5


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (16, 2, 4, 4)])
def test_normal_numbers_depend_on_key_and_size_alone(shape):
    torch.manual_seed(1)
    first = normal(9, shape)
    torch.manual_seed(2)
    assert torch.equal(first, normal(9, shape)) and first.shape == shape
    assert not torch.equal(first, normal(10, shape)) and normal((1 << 64) - 1, shape).isfinite().all()


def test_the_mixer_of_arrays_is_the_mixer_of_integers():
    values = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert mix64_array(7, values).tolist() == [mix64(7, int(v)) for v in values]
