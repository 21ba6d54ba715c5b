"""Hand counts for sentences that name nothing, and for videos with frames that are not annotated."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from film import SIZE
from golden_export import BOX, DATA, write_golden_export
from layouts import write_youtube
from PIL import Image
from sparse_layouts import FRAMES, box, write_listed

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.sources import open_source
from flowmask.launch.progress import show_scores
from flowmask.models.errors import DataError
from flowmask.trainer.score.evaluate import _is_whole, evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.judging import _score, shuffled_partners


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_golden_export(tmp_path_factory.mktemp("golden"))


def run(export: Path, out: Path, data: dict[str, Any], **changes: Any) -> Any:
    config = {
        "out": out,
        "checkpoint": str(export),
        "data": data,
        "box": BOX,
        "precision": "fp32",
        "device": "cpu",
        **changes,
    }
    return evaluate(EvaluateConfig.model_validate(config))


@pytest.fixture
def listed(tmp_path: Path) -> Any:
    """One video with a box in every frame, frames 1 and 4 annotated, and a sentence that names nothing."""
    root = write_listed(tmp_path / "data", annotated=[1, 4], without_target=True)
    return open_source(DataSourceConfig(source="videos", root=root)).videos()[0]


def scores(video: Any, expression: Any, predicted: np.ndarray, *, at_once: int = 2) -> dict[str, float]:
    pieces = [(range(i, min(i + at_once, FRAMES)), predicted[i : i + at_once]) for i in range(0, FRAMES, at_once)]
    return _score(video, expression, pieces).scores()


@pytest.mark.parametrize("at_once", [1, 2, 5, 6])
def test_frames_that_nobody_annotated_count_in_no_score(listed: Any, at_once: int) -> None:
    right = np.stack([box(i) for i in range(FRAMES)])
    predicted = right.copy()
    predicted[[0, 2, 3, 5]] = np.random.default_rng(0).random((4, *SIZE)) > 0.5
    assert scores(listed, listed.expressions[0], predicted, at_once=at_once) == {"j": 100, "f": 100, "jf": 100}
    predicted[4] = False
    assert scores(listed, listed.expressions[0], predicted, at_once=at_once) == {"j": 50, "f": 50, "jf": 50}


def test_a_frame_of_a_sentence_that_names_nothing_scores_100_if_the_mask_is_empty_too_else_0(listed: Any) -> None:
    nothing = listed.expressions[1]
    predicted = np.zeros((FRAMES, *SIZE), bool)
    assert scores(listed, nothing, predicted) == {"j": 100, "f": 100, "jf": 100}
    predicted[1, 5, 5] = True
    assert scores(listed, nothing, predicted) == {"j": 50, "f": 50, "jf": 50}
    predicted[:] = True  # a full frame has no contour: F is 100, as in the public script
    assert scores(listed, nothing, predicted) == {"j": 0, "f": 100, "jf": 50}


def test_an_evaluation_scores_it_as_any_other_and_counts_it_apart(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DATA, tmp_path / "data")
    path = tmp_path / "data/valid_u/meta_expressions.json"
    meta = json.loads(path.read_text())
    video_id, exp_id = next((v, e) for v, entry in meta["videos"].items() for e in entry["expressions"])
    meta["videos"][video_id]["expressions"][exp_id]["anno_id"] = []
    path.write_text(json.dumps(meta))
    data = {"source": "mevis", "root": tmp_path / "data", "split": "valid_u"}
    before = run(export, tmp_path / "before", {**data, "root": DATA})
    found = run(export, tmp_path / "e", data)
    key = f"{video_id}/{exp_id}"
    masks = [np.asarray(Image.open(png)) for png in sorted((tmp_path / "e/masks" / key).iterdir())]
    assert found.per_expression[key]["j"] == 100 * np.mean([not mask.any() for mask in masks])
    assert {k: v for k, v in found.per_expression.items() if k != key} == {
        k: v for k, v in before.per_expression.items() if k != key
    }
    assert found.totals["jf"] == pytest.approx(np.mean([entry["jf"] for entry in found.per_expression.values()]))
    written = json.loads((tmp_path / "e/scores.json").read_text())
    assert (written["no_target"], before.no_target, found.expressions) == (1, 0, before.expressions)
    masks_of = {key: sorted((tmp_path / "e/masks" / key).iterdir()) for key in found.per_expression}
    answered = {k: any(np.asarray(Image.open(png)).any() for png in pngs) for k, pngs in masks_of.items()}
    others = [k for k in answered if k != key]
    n_acc, t_acc = 100 * (not answered[key]), 100 * np.mean([answered[k] for k in others])
    jf_target = np.mean([found.per_expression[k]["jf"] for k in others])
    assert (written["n_acc"], written["t_acc"]) == (n_acc, pytest.approx(t_acc))
    show_scores(found, tmp_path / "e")
    assert f"N-acc {n_acc:.1f}, T-acc {t_acc:.1f}, Final {written['final']:.1f}" in capsys.readouterr().out
    assert written["jf_target"] == pytest.approx(jf_target)
    assert written["final"] == pytest.approx((written["jf"] + n_acc + t_acc) / 3)
    assert written["final_target"] == pytest.approx((jf_target + n_acc + t_acc) / 3)
    without = json.loads((tmp_path / "before/scores.json").read_text())
    assert [without[name] for name in ("n_acc", "t_acc", "final", "jf_target", "final_target")] == [None] * 5
    assert {b: one["expressions"] for b, one in written["slices"]["target"].items()} == {
        "something": len(others),
        "nothing": 1,
    }
    assert written["slices"]["target"]["nothing"]["jf"] == found.per_expression[key]["jf"]
    assert written["intervals"]["n_acc"] is None, "of one video nothing is drawn"
    low, high = written["intervals"]["jf"]
    assert 0 <= low <= written["jf"] <= high <= 100
    assert without["intervals"].keys() == {"j", "f", "jf", "n_acc", "t_acc", "final", "jf_target", "final_target"}
    assert without["intervals"]["t_acc"] is None
    assert "of them naming nothing" in (tmp_path / "e/report.html").read_text()
    assert "naming nothing" not in (tmp_path / "before/report.html").read_text()


def test_a_video_whose_record_lacks_what_this_version_measures_is_done_again() -> None:
    unscored = {"text": "a dog", "answered": False, "presence": 0.0}
    whole = {**unscored, "right": {"j": 0.0, "f": 0.0, "jf": 0.0}, "truth": {"frames": 2, "absent": 0, "share": 0.1}}
    for entry in (unscored, whole):
        assert _is_whole({"frames": 2, "expressions": {"0": entry}})
    for lacking in ("answered", "presence", "truth"):
        entry = {key: value for key, value in whole.items() if key != lacking}
        assert not _is_whole({"frames": 2, "expressions": {"0": entry}})
    assert not _is_whole(None)


def test_a_sparse_video_is_seen_whole_and_scored_in_its_annotated_frames(export: Path, tmp_path: Path) -> None:
    data = {"source": "videos", "split": "train"}
    sparse = write_listed(tmp_path / "sparse", annotated=[1, 4])
    found = run(export, tmp_path / "e", {**data, "root": sparse}, decoder_score=True, report_examples=1)
    pngs = sorted((tmp_path / "e/masks/film/0").iterdir())
    assert len(pngs) == FRAMES
    masks = [np.asarray(Image.open(pngs[i])) > 0 for i in (1, 4)]
    j = [np.sum(mask & box(i)) / max(1, np.sum(mask | box(i))) for mask, i in zip(masks, (1, 4))]
    assert found.per_expression["film/0"]["j"] == pytest.approx(100 * np.mean(j))
    assert 0 <= found.decoder["j"] <= 100
    report = (tmp_path / "e/report.html").read_text()
    assert "00001</span>" in report and "00002</span>" not in report, "the sheet shows frames with a truth"


def test_of_two_sentences_that_name_nothing_none_is_the_wrong_one(tmp_path: Path) -> None:
    root = write_listed(tmp_path / "data", annotated=None, without_target=True)
    entry = json.loads((root / "train.jsonl").read_text())
    entry["expressions"].append({"text": "the dragon", "masks": []})
    (root / "train.jsonl").write_text(json.dumps(entry))
    video = open_source(DataSourceConfig(source="videos", root=root)).videos()[0]
    chosen = [shuffled_partners(video, seed=seed) for seed in range(20)]
    assert all(partners["1"] == partners["2"] == "0" for partners in chosen)
    assert {partners["0"] for partners in chosen} == {"1", "2"}


def test_an_evaluation_refuses_an_object_that_no_mask_holds_before_it_writes(export: Path, tmp_path: Path) -> None:
    write_youtube(tmp_path / "data")
    for path in (tmp_path / "data/train/Annotations/2c3d").iterdir():
        Image.fromarray(255 * np.asarray(Image.open(path)).astype(bool).astype(np.uint8)).save(path)
    data = {"source": "ref_youtube_vos", "root": tmp_path / "data", "split": "train"}
    with pytest.raises(DataError, match=r"video 2c3d: expression 0 names object 1, .* grey pictures of 0 and 255"):
        run(export, tmp_path / "e", data)
    assert not (tmp_path / "e").exists()
