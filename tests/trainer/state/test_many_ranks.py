"""A checkpoint of many ranks, read by any number of ranks: the number of files that each of them opens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flowmask.trainer.state import checkpoint
from flowmask.trainer.state.checkpoint import Piece, fill
from flowmask.trainer.state.saving import nearest_first

WROTE, ELEMENTS = 48, 1920


@pytest.mark.parametrize("world", [1, 2, 12, 40, 48, 64, 480])
def test_a_rank_opens_the_files_that_hold_its_part_and_two_more_at_the_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """One parameter cut evenly, as every ZeRO stage cuts sharded tensors."""
    whole, share = torch.arange(ELEMENTS, dtype=torch.float32), ELEMENTS // WROTE
    names = [f"rank_{rank:05d}.safetensors" for rank in range(WROTE)]
    for rank, name in enumerate(names):
        save_file({f"w|master|{rank * share}": whole[rank * share : (rank + 1) * share].clone()}, tmp_path / name)
    real, opened = checkpoint.safe_open, []

    def counted(file: Any, **kwargs: Any) -> Any:
        opened.append(file)
        return real(file, **kwargs)

    monkeypatch.setattr(checkpoint, "safe_open", counted)
    own = ELEMENTS // world
    for rank in {0, world // 3, world // 2, world - 1}:
        target = torch.full((own,), -1.0)
        opened.clear()
        fill(
            [Piece("w", "master", rank * own, target)], [tmp_path / name for name in nearest_first(names, rank, world)]
        )
        assert torch.equal(target, whole[rank * own : (rank + 1) * own])
        assert len(opened) <= WROTE / world + 2
