"""Training timesteps: the reference's law, computed from its record, and our one law for every batch size.

The reference sets exactly int(B/2) timesteps of a batch to 1000. Our code gives each example the law of batch size 1.
The timesteps below 1000 have the same distribution in both.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowmask.models.flow import draw_timestep
from parity.core import Check, ParitySet, near, same

PROBABILITY = 0.5
SIGMAS = 5.0  # limit, in standard errors, for the mean of random draws
FRACTION, BIN, CALLS = 0.015, 0.012, 20000  # the tolerances hold for 20000 calls


@functools.cache
def _ours(draws: int) -> NDArray[np.int64]:
    source = torch.Generator().manual_seed(0)
    special, u = torch.rand(2, draws, generator=source, dtype=torch.float64)
    return draw_timestep(special, u, boundary_probability=PROBABILITY).numpy()


# Exact moments of the law below 1000: floor(1000 u) with 0 moved to 1.
_VALUES = np.maximum(np.arange(1000), 1)
MEAN, STD = _VALUES.mean(), _VALUES.std()


def _batch_checks(name: str, entry: Mapping[str, Any]) -> Iterator[Check]:
    batch = int(name.removeprefix("batch_"))
    draws = entry["calls"] * batch
    special = int(batch * PROBABILITY) if batch > 1 else None
    fraction = PROBABILITY if special is None else special / batch
    rest = draws * (1 - fraction)
    error = SIGMAS / math.sqrt(rest)
    fewer = max(1.0, math.sqrt(CALLS / entry["calls"]))
    near_half, near_tenth = FRACTION * fewer, BIN * fewer
    histogram = entry["histogram_of_rest"]
    counts = {int(n): calls for n, calls in entry["number_of_1000_per_batch"].items()}
    ours = functools.cache(lambda: _ours(draws))
    below = functools.cache(lambda: ours()[ours() < 1000])

    def fractions() -> NDArray[np.float64]:
        return np.histogram(below(), bins=histogram["edges"])[0] / len(below())

    yield Check("draws", lambda: same(entry["draws"], draws))
    yield Check(
        "fraction_at_1000",
        lambda: near(entry["fraction_at_1000"], fraction, abs=near_half if special is None else 1e-12),
    )
    yield Check("our fraction_at_1000", lambda: near((ours() == 1000).mean(), PROBABILITY, abs=near_half))
    if special is None:
        yield Check(
            "fraction_at_1000 of ours", lambda: near((ours() == 1000).mean(), entry["fraction_at_1000"], abs=near_half)
        )
    yield Check("number_of_1000_per_batch", lambda: same(sum(counts.values()), entry["calls"]))
    at_special = sum(n * calls for n, calls in counts.items()) / draws
    yield Check("number_of_1000 is the fraction", lambda: near(at_special, entry["fraction_at_1000"], abs=1e-12))
    if special is not None:
        yield Check("exactly int(B/2)", lambda: same(counts, {special: entry["calls"]}))
    yield Check("fraction_at_1000_by_position length", lambda: same(len(entry["fraction_at_1000_by_position"]), batch))
    for i, value in enumerate(entry["fraction_at_1000_by_position"]):
        yield Check(f"fraction_at_1000_by_position[{i}]", lambda v=value: near(v, fraction, abs=near_half))
    yield Check(
        "fraction_at_1000_by_position mean",
        lambda: near(np.mean(entry["fraction_at_1000_by_position"]), entry["fraction_at_1000"], abs=1e-9),
    )
    yield Check("histogram edges", lambda: same(histogram["edges"], np.linspace(0, 1000, 11).tolist()))
    yield Check("histogram sum", lambda: near(sum(histogram["fractions"]), 1.0, abs=1e-9))
    yield Check("histogram length", lambda: same(len(histogram["fractions"]), 10))
    for i, value in enumerate(histogram["fractions"]):
        yield Check(f"histogram[{i}]", lambda v=value: near(v, 0.1, abs=near_tenth))
        yield Check(f"our histogram[{i}]", lambda i=i: near(fractions()[i], 0.1, abs=near_tenth))
    yield Check("rest_min", lambda: same(int(below().min()), entry["rest_min"]))
    yield Check("rest_max", lambda: same(int(below().max()), entry["rest_max"]))
    yield Check("rest_mean", lambda: near(entry["rest_mean"], MEAN, abs=STD * error))
    yield Check("our rest_mean", lambda: near(below().mean(), MEAN, abs=STD * error))
    yield Check("rest_std", lambda: near(entry["rest_std"], STD, abs=STD * error))
    yield Check("our rest_std", lambda: near(below().std(), STD, abs=STD * error))
    for value, probability in ((1, 0.002), (2, 0.001), (999, 0.001)):
        tolerance = math.sqrt(probability) * error
        key = f"fraction_of_rest_at_{value}"
        yield Check(key, lambda k=key, p=probability, t=tolerance: near(entry[k], p, abs=t))
        yield Check(f"our {key}", lambda v=value, p=probability, t=tolerance: near((below() == v).mean(), p, abs=t))


def timesteps_checks(data: ParitySet) -> Iterator[Check]:
    record = data.record("timesteps/stats.json")
    assert "batch_1" in record, "the law is that of batch size 1, which is not recorded"
    for name, entry in record.items():
        yield from (Check(f"{name}.{check.name}", check.run) for check in _batch_checks(name, entry))
