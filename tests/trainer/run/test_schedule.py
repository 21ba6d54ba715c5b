"""The learning rate is a function of the step alone."""

import itertools
import math
from typing import Any

import pytest

from flowmask.trainer.config import TrainConfig
from flowmask.trainer.run.schedule import learning_rate


def rates(count: int, **train: Any) -> list[float]:
    config = TrainConfig(steps=20, global_batch=1, lr=1.0, **train)
    return [learning_rate(step, config) for step in range(count)]


def test_constant_stays() -> None:
    assert rates(30) == [1.0] * 30


def test_warm_up_rises_evenly_and_ends_at_the_full_rate() -> None:
    assert rates(6, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_full_rate_to_its_floor_and_stays_there() -> None:
    found = rates(40, schedule="cosine", warmup_steps=4, final_lr_fraction=0.1)
    assert found[4] == 1.0 and found[12] == pytest.approx(0.55)
    assert all(later < earlier for earlier, later in itertools.pairwise(found[4:21]))
    assert found[20:] == [pytest.approx(0.1)] * 20
    assert found[8] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_multistep_drops_at_each_named_step() -> None:
    found = rates(8, schedule="multistep", decay_at_steps=[3, 6], decay_factor=0.5)
    assert found == [1.0] * 3 + [0.5] * 3 + [0.25] * 2


def test_more_steps_bend_no_schedule_whose_length_is_fixed() -> None:
    short = TrainConfig(steps=20, global_batch=1, schedule="cosine", schedule_steps=20)
    long = short.model_copy(update={"steps": 50})
    assert [learning_rate(s, short) for s in range(50)] == [learning_rate(s, long) for s in range(50)]
