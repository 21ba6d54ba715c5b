"""The average of the weights follows its law and takes the expected memory."""

from typing import Any

import pytest

from flowmask.trainer.step.ema import decay_of_update


def test_the_decay_is_none_at_first_then_grows_to_its_limit() -> None:
    assert decay_of_update(1, decay=0.9999) == 0.0
    assert decay_of_update(2, decay=0.9999) == pytest.approx(2 / 11)
    assert decay_of_update(91, decay=0.9) == 0.9
    assert decay_of_update(10**7, decay=0.9999) == 0.9999


@pytest.mark.parametrize("stage", ["0", "1", "3"])
def test_the_sharded_average_is_the_average_of_the_whole_weights(two_ranks: list[dict[str, Any]], stage: str) -> None:
    assert two_ranks[0]["average"][stage]["gap"] < 1e-6


@pytest.mark.parametrize("stage", ["0", "1", "3"])
def test_the_average_costs_four_bytes_a_parameter_over_all_ranks(two_ranks: list[dict[str, Any]], stage: str) -> None:
    rows = [found["average"][stage] for found in two_ranks]
    assert sum(row["shadow_bytes"] for row in rows) == 4 * rows[0]["parameters"]
    assert max(row["shadow_bytes"] for row in rows) <= 0.52 * 4 * rows[0]["parameters"]
