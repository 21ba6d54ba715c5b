"""The process group's few collectives, in this process alone and in two real ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flowmask.models.errors import ConfigError
from flowmask.trainer import distributed


def test_one_process_without_a_launcher_is_a_group_of_one() -> None:
    distributed.init()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.any_true(True) and not distributed.any_true(False)
    assert distributed.broadcast_object([1]) == [1] and distributed.gather_objects("x") == ["x"]
    assert distributed.all_reduce_sum(torch.ones(2)).tolist() == [1.0, 1.0]
    distributed.barrier()


def test_half_set_launcher_variables_are_an_error_that_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("FLOWMASK_MEET", raising=False)
    with pytest.raises(ConfigError, match="FLOWMASK_MEET"):
        distributed.init()


def test_what_one_rank_says_every_rank_hears(two_ranks: list[dict[str, Any]]) -> None:
    assert [found["rank"] for found in two_ranks] == [0, 1]
    for found in two_ranks:
        assert found["any"] == [True, False]
        assert found["broadcast"] == {"from": 0}
        assert found["gathered"] == [0, 1]


def test_a_rank_says_nothing_about_kernels_that_nobody_asked_for(
    two_ranks: list[dict[str, Any]], saved_by_two: Path
) -> None:
    for found in two_ranks:
        assert "kernels" not in (saved_by_two.parent / f"log_{found['rank']}.txt").read_text()
