"""Laws of the random numbers: functions of their key alone, and distributed as they say."""

import pytest
import torch

from flowmask.data_pipeline.randomness import mix64, mix64_array, normal


def test_normal_numbers_are_the_splitmix64_stream_of_their_key_through_box_muller():
    """Computed the slow way, on Python's integers and doubles."""
    import math

    import numpy as np

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
    import numpy as np

    values = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert mix64_array(7, values).tolist() == [mix64(7, int(v)) for v in values]
