"""Recomputation and compilation in a whole run: what they may change, and what they refuse."""

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


def test_nor_does_it_of_the_mask_decoder_under_any_stage(lab: Path, tmp_path: Path) -> None:
    decoder = {"objective.kind": "mask_decoder", "train.steps": 3, "train.precision": "fp32"}
    ways = [("none", 2), ("selective", 2), ("full", 2), ("none", 3), ("full", 3)]
    jobs = [
        {
            "lab": str(lab),
            "out": str(tmp_path / f"{kind}_{stage}"),
            "overrides": decoder | {"train.activation_checkpointing": kind, "train.zero_stage": stage},
        }
        for kind, stage in ways
    ]
    run_group(jobs, folder=tmp_path / "ranks")
    for kind, stage in ways:
        assert losses(tmp_path / f"{kind}_{stage}") == losses(tmp_path / f"none_{stage}")
