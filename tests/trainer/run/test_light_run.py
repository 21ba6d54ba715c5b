"""A run that trains a light mask decoder: trainer, loss and validation as for the VAE's; both are kept apart."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from runs import losses, rows, run_config, run_group, start, unequal_tensors

from flowmask.models.config import LightDecoderConfig
from flowmask.models.decoders.either import network_of
from flowmask.models.errors import CheckpointError, WeightsError
from flowmask.trainer.predict.weights import load_mask_decoder, source_settings

SMALL = {"width": 8, "depth": 1}
LIGHT: dict[str, Any] = {"objective.kind": "light_mask_decoder", "objective.network": SMALL, "train.precision": "fp32"}
WATCHED = {"evaluate.every_steps": 2, "evaluate.examples": 2, "evaluate.jf_examples": 2, "evaluate.overlays": 0}


@pytest.fixture(scope="module")
def light(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("light") / "run"
    assert start(lab, out, LIGHT | WATCHED | {"train.steps": 6}) == 0
    return out


def test_it_learns_by_the_same_loss_is_validated_and_its_run_says_its_size(light: Path) -> None:
    found = rows(light)
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[0]["loss"] == pytest.approx(8 * found[0]["focal"] + 4 * found[0]["dice"], rel=1e-5)
    watched = [json.loads(line) for line in (light / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in watched] == [2, 4, 6] and all("eval_jf" in row for row in watched)
    settings = source_settings(str(light))
    assert (settings["objective"], settings["light_decoder"]) == ("light_mask_decoder", SMALL)
    assert network_of(load_mask_decoder(str(light)).state_dict, where="x") == LightDecoderConfig(**SMALL)


def test_a_resumed_run_is_one_that_never_stopped(lab: Path, light: Path, tmp_path: Path) -> None:
    for steps in (3, 6):
        assert start(lab, tmp_path / "run", LIGHT | {"train.steps": steps}) == 0
    assert losses(tmp_path / "run") == losses(light) and not unequal_tensors(tmp_path / "run", light)


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_sharded_weights_train_as_whole_ones(lab: Path, tmp_path: Path, stage: int) -> None:
    ways = {"whole": {"train.zero_stage": 0}, "sharded": {"train.zero_stage": stage}}
    short = LIGHT | {"train.steps": 3}
    jobs = [{"lab": str(lab), "out": str(tmp_path / name), "overrides": short | way} for name, way in ways.items()]
    run_group(jobs, folder=tmp_path / "ranks")
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_weights_of_another_decoder_or_size_are_refused_in_one_line(lab: Path, light: Path, tmp_path: Path) -> None:
    init, other = {"model.init": str(light), "train.steps": 1}, {"objective.kind": "mask_decoder"}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (init | other, WeightsError, "is a light decoder of width 8 and depth 1, but a decoder of the VAE's shape is"),
        (LIGHT | init | {"objective.network": {"width": 4}}, WeightsError, "width 8 .* width 4 .* set objective.kind"),
        (init, WeightsError, "trained light_mask_decoder, but weights of dit are needed"),
        (LIGHT | {"train.activation_checkpointing": "full"}, ValidationError, "light_mask_decoder can't recompute"),
        (LIGHT | {"objective.network": {"widht": 4}}, ValidationError, "widht"),
    ]
    for overrides, error, said in cases:
        with pytest.raises(error, match=said) as caught:
            start(lab, tmp_path / "run", overrides)
        assert error is ValidationError or "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"objective\.network\.width"):
        start(lab, light, LIGHT | WATCHED | {"train.steps": 7, "objective.network": {"width": 4, "depth": 1}})
    assert start(lab, tmp_path / "again", LIGHT | init) == 0
    assert losses(tmp_path / "again")[0] < losses(light)[0]
    assert run_config(lab, tmp_path, LIGHT).makes == "mask_decoder"
