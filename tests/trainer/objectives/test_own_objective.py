"""An objective in one file of an installed package can do all that ours can."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from plugin import installed
from runs import GOLDEN, rows, run_config, start
from typer.testing import CliRunner

from flowmask.launch.cli.main import app
from flowmask.models.errors import ConfigError
from flowmask.trainer.objectives import objective_class
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.predict import predict
from flowmask.trainer.predict.weights import load_dit
from flowmask.trainer.score.evaluate import evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig

HUBER = (Path(__file__).parents[3] / "docs" / "examples" / "own_objective.py").read_text()
OURS = {"objective.kind": "huber", "objective.delta": 0.01, "train.steps": 2}


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("package") / "site"
    entry = {"name": "huber", "value": "own_objective:Huber"}
    with installed(folder, group="flowmask.objectives", source=HUBER, **entry):
        yield


@pytest.fixture(scope="module")
def run(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("huber") / "run"
    assert start(lab, out, OURS | {"evaluate.every_steps": 2, "evaluate.examples": 2, "evaluate.jf_examples": 1}) == 0
    return out


def test_an_objective_of_one_file_is_planned_and_submitted(lab: Path, tmp_path: Path) -> None:
    config = tmp_path / "huber.yaml"
    config.write_text(yaml.safe_dump(run_config(lab, tmp_path / "run", OURS).model_dump(mode="json")))
    planned = CliRunner().invoke(app, ["plan", str(config), "--json"], catch_exceptions=False)
    assert json.loads(planned.stdout)["kind"] == "huber" and json.loads(planned.stdout)["tokens"] > 0
    tried = CliRunner().invoke(app, ["submit", str(config), "launch.gpus_per_node=0", "--dry-run"])
    assert tried.exit_code == 0, tried.output


def test_an_objective_of_one_file_trains_and_is_validated(lab: Path, run: Path) -> None:
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2] and 0 < found[-1]["loss"] < 0.1  # at most delta x error
    evaluated = json.loads((run / "evaluations.jsonl").read_text())
    assert {"eval_loss", "eval_jf"} <= evaluated.keys()
    assert start(lab, run, OURS | {"train.steps": 3}) == 0


def test_weights_of_an_objective_of_one_file_are_evaluated_predicted_with_and_exported(
    lab: Path, run: Path, tmp_path: Path
) -> None:
    data = {"source": "mevis", "root": GOLDEN, "split": "valid_u"}
    settings = {"out": tmp_path / "scores", "checkpoint": str(run), "data": data, "max_videos": 1, "device": "cpu"}
    scores = evaluate(EvaluateConfig.model_validate(settings))
    assert scores is not None and scores.totals["jf"] is not None
    video = next((GOLDEN / "valid_u" / "JPEGImages").iterdir())
    assert len(predict(video, ["a dog"], checkpoint=str(run), out=tmp_path / "masks", device="cpu").prompts) == 1
    for format, name in (("diffusers", "a"), ("flowrvs", "b.pth"), ("safetensors", "c.safetensors")):
        done = export(str(run), format=format, out=tmp_path / name)
        assert load_dit(str(done.path)).sha256 == done.sha256 == load_dit(str(run)).sha256


def test_an_unknown_key_names_those_of_the_kind_and_an_unknown_kind_the_known_ones(lab: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key objective\.dleta; .* huber knows boundary_bias, "):
        run_config(lab, tmp_path, {"objective.kind": "huber", "objective.dleta": 1})
    with pytest.raises(ConfigError, match=r"'gan'; known: flow_matching, huber, light_mask_decoder, mask_decoder"):
        objective_class("gan")
