"""A metric in one file of an installed package is shown wherever ours are."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from golden_export import BOX, DATA, write_golden_export
from plugin import installed
from runs import start

from flowmask.launch.progress import show_scores
from flowmask.trainer.score.evaluate import evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.track import spool

OVERALL = (Path(__file__).parents[3] / "docs" / "examples" / "own_metric.py").read_text()


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("package") / "site"
    entry = {"name": "oiou", "value": "own_metric:OverallIou"}
    with installed(folder, group="flowmask.metrics", source=OVERALL, **entry):
        yield


def test_a_metric_of_one_file_is_in_the_scores_the_report_and_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "out": tmp_path / "e",
        "checkpoint": str(write_golden_export(tmp_path / "golden")),
        "data": {"source": "mevis", "root": DATA, "split": "valid_u"},
        "box": BOX,
        "precision": "fp32",
        "device": "cpu",
        "shuffled_text": True,
        "decoder_score": True,
    }
    scores = evaluate(EvaluateConfig.model_validate(settings))
    assert scores is not None
    saved = json.loads((tmp_path / "e" / "scores.json").read_text())
    each = [entry["oiou"] for entry in saved["per_expression"].values()]
    assert 0 < saved["oiou"] <= 100 and saved["oiou"] != pytest.approx(np.mean(each))  # over the set, not a mean
    assert 0 < saved["decoder"]["oiou"] <= 100
    assert "<th class=number>overall IoU" in (tmp_path / "e" / "report.html").read_text()
    show_scores(scores, tmp_path / "e")
    assert "overall IoU" in capsys.readouterr().out


def test_a_metric_of_one_file_is_measured_while_training_and_sent_to_mlflow(lab: Path, tmp_path: Path) -> None:
    tracked = {"tracking.enabled": True, "tracking.uri": "http://127.0.0.1:9", "tracking.end_timeout_s": 0.0}
    evaluated = {"evaluate.every_steps": 2, "evaluate.examples": 2, "evaluate.jf_examples": 1, "train.steps": 2}
    assert start(lab, tmp_path / "run", evaluated | tracked) == 0
    found = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    assert {"eval_j", "eval_f", "eval_jf", "eval_oiou"} <= found.keys()
    (point,) = [note.point for note in spool.Outbox(tmp_path / "run", offset=0).take() if note.point is not None]
    assert point.metrics["eval_oiou"] == found["eval_oiou"]
