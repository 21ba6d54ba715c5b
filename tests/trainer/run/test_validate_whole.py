"""Whole videos while training: the numbers of `flowmask evaluate`, and no trace in the training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import GOLDEN, SignalAt, losses, rows, run_config, run_group, start, unequal_tensors

from flowmask.models.errors import ConfigError, DataError, UserError
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.trainer.predict.inference import LoadedSegmenter
from flowmask.trainer.score.evaluate import evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.state.checkpoint import read_state

CHEAP = {"evaluate.every_steps": 5, "evaluate.examples": 2, "evaluate.jf_examples": 1, "evaluate.overlays": 0}
EXACT = {"train.precision": "fp32", "train.micro_batch": 1}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three videos that no cache has."""
    root = tmp_path_factory.mktemp("held")
    folder = shutil.copytree(GOLDEN / "valid_u", root / "valid_u")
    videos = json.loads((folder / "meta_expressions.json").read_text())["videos"]
    named = {"h0": "vidA", "h1": "vidB", "h2": "vidA"}
    for new, old in named.items():
        shutil.copytree(folder / "JPEGImages" / old, folder / "JPEGImages" / new)
    for old in videos:
        shutil.rmtree(folder / "JPEGImages" / old)
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": {n: videos[o] for n, o in named.items()}}))
    return root


def whole(held: Path, **more: Any) -> dict[str, Any]:
    """The overrides of a run that is evaluated on whole videos too."""
    data = {"source": "mevis", "root": str(held), "split": "valid_u"}
    return CHEAP | {"evaluate.whole_videos": {"data": data, **more}}


def found(run: Path) -> dict[int, dict[str, float]]:
    """The numbers of whole videos by step, where there are some."""
    every = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    numbers = {row["step"]: {k.removeprefix("eval_whole_"): v for k, v in row.items() if "whole" in k} for row in every}
    return {step: some for step, some in numbers.items() if some}


def evaluated(run: Path, held: Path, out: Path, **changes: Any) -> dict[str, float]:
    """What `flowmask evaluate` says of a checkpoint, of its numbers that training shows."""
    data = {"source": "mevis", "root": held, "split": "valid_u"}
    given = {"out": out, "checkpoint": str(run), "data": data, "device": "cpu", "protocol": "mevis"} | changes
    scores = evaluate(EvaluateConfig.model_validate(given))
    assert scores is not None and scores.protocol is not None
    table = scores.protocol["tables"][scores.protocol["convention"]]["all"]
    every = scores.totals | scores.nothing | {f"mevis_{name}": value for name, value in table.items()}
    return {name: value for name, value in every.items() if value is not None}


@pytest.fixture(scope="module")
def run(lab: Path, held: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bf16 with whole videos at its last step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert start(lab, out, whole(held, every_steps=10, protocol="mevis") | {"evaluate.best": "eval_whole_jf"}) == 0
    return out


def test_the_numbers_are_those_of_an_evaluation_of_the_same_checkpoint(run: Path, held: Path, tmp_path: Path) -> None:
    assert found(run) == {10: evaluated(run, held, tmp_path / "e")}
    assert found(run)[10]["jf"] > 0 and "mevis_jf" in found(run)[10]
