"""Recomputation and compilation in a whole run: their allowed changes, and their refusals."""

from pathlib import Path

import pytest
from runs import losses, run_group, start


def test_no_kind_of_recomputation_changes_a_loss_and_a_resume_may_choose_another(lab: Path, tmp_path: Path) -> None:
    for kind in ("none", "full", "selective"):
        assert start(lab, tmp_path / kind, {"train.steps": 4, "train.activation_checkpointing": kind}) == 0
    assert losses(tmp_path / "none") == losses(tmp_path / "full") == losses(tmp_path / "selective")
    longer = {"train.steps": 6}
    assert start(lab, tmp_path / "none", longer) == 0
    assert start(lab, tmp_path / "full", longer | {"train.activation_checkpointing": "selective"}) == 0
    assert losses(tmp_path / "none") == losses(tmp_path / "full")


@pytest.mark.long  # compiles for two shapes; tests/models/test_dit.py has the short version
def test_a_compiled_run_trains_the_same_within_bf16(lab: Path, tmp_path: Path) -> None:
    assert start(lab, tmp_path / "plain", {"train.steps": 3}) == 0
    assert start(lab, tmp_path / "compiled", {"train.steps": 3, "train.compile": True}) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=5e-3)


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.long)])
def test_nor_does_it_of_the_mask_decoder_whose_weights_are_sharded(lab: Path, tmp_path: Path, stage: int) -> None:
    decoder = {"objective.kind": "mask_decoder", "train.steps": 2, "train.precision": "fp32", "train.zero_stage": stage}
    kinds = ("none", "full") if stage == 3 else ("none", "full", "selective")
    ways = [(kind, decoder | {"train.activation_checkpointing": kind}) for kind in kinds]
    jobs = [{"lab": str(lab), "out": str(tmp_path / kind), "overrides": overrides} for kind, overrides in ways]
    run_group(jobs, folder=tmp_path / "ranks")
    assert all(losses(tmp_path / kind) == losses(tmp_path / "none") for kind in kinds)
