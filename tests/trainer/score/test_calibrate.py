"""Calibration: the other videos give the threshold, and it is the same in every process and after every stop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disturbed import contents
from golden_export import BOX, write_golden_export
from PIL import Image
from pydantic import ValidationError
from thresholds import write_some_naming_nothing

from flowmask.models.errors import ConfigError
from flowmask.models.segment import Segmenter
from flowmask.trainer.predict.inference import folder_state
from flowmask.trainer.predict.presence import RULE, Judged, sweep
from flowmask.trainer.score.calibrate import _own_first
from flowmask.trainer.score.evaluate import evaluate, fingerprint_now
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.results import Scores

# Every second text names nothing; by chance the recorded weights give smaller presences for these.
TEXTS = ["the red car", "a dog", "a thing of kind 5", "a thing of kind 1", "two birds near the water"]
TEXTS += ["a thing of kind 3"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """golden/export: weights; scored and others: datasets without a common video."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lab")
    write_golden_export(folder / "golden")
    write_some_naming_nothing(folder / "scored", {"one": "vidB", "two": "vidB"}, TEXTS)
    write_some_naming_nothing(folder / "others", {"three": "vidB", "four": "vidB"}, [text + "!" for text in TEXTS])
    return folder


def config(lab: Path, out: Path, data: str = "scored", **changes: Any) -> EvaluateConfig:
    settings = {
        "out": out,
        "checkpoint": str(lab / "golden/export"),
        "data": named(lab, data),
        "box": BOX,
        "precision": "fp32",
        "device": "cpu",
        "report_examples": 0,
    }
    return EvaluateConfig.model_validate(settings | changes)


def named(lab: Path, data: str) -> dict[str, Any]:
    return {"source": "mevis", "root": lab / data, "split": "valid_u"}


def calibrating(lab: Path, out: Path, **changes: Any) -> EvaluateConfig:
    return config(lab, out, calibrate={"enabled": True, "data": named(lab, "others")}, **changes)


def scored(*args: Any, **options: Any) -> Scores:
    scores = evaluate(*args, **options)
    assert scores is not None
    return scores


@pytest.fixture(scope="module")
def done(lab: Path) -> dict[str, Scores]:
    """scored and others without a threshold; calibrated; then both with the chosen threshold."""
    chosen = str(lab / "calibrated")
    return {
        "scored": scored(config(lab, lab / "out_scored")),
        "others": scored(config(lab, lab / "out_others", "others")),
        "calibrated": scored(calibrating(lab, lab / "calibrated")),
        "scored again": scored(config(lab, lab / "again", presence=chosen)),
        "others again": scored(config(lab, lab / "others_again", "others", presence=chosen)),
    }


def masks(out: Path, key: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((out / "masks" / key).iterdir())]


def has_target(key: str) -> bool:
    return int(key.split("/")[1]) % 2 == 0


def test_the_threshold_is_the_one_that_the_other_videos_tell(lab: Path, done: dict[str, Scores]) -> None:
    seen = done["others"].presences
    judged = [
        Judged(number, any(mask.any() for mask in masks(lab / "out_others", key)), has_target(key))
        for key, number in seen.items()
    ]
    threshold, n_acc, t_acc = sweep(judged)
    assert threshold > 0 and len(judged) == 2 * len(TEXTS)
    written = json.loads((lab / "calibrated/scores.json").read_text())
    assert written["presence_threshold"] == written["presence"]["threshold"] == threshold
    told = {"source": "mevis", "split": "valid_u", "sentences": 12, "no_target": 6, "n_acc": n_acc, "t_acc": t_acc}
    assert written["presence"]["calibration"] == told and written["presence"]["rule"] == RULE
    assert done["others again"].nothing["n_acc"] == pytest.approx(n_acc)
    assert done["others again"].nothing["t_acc"] == pytest.approx(t_acc)
    assert "Presence threshold" in (lab / "calibrated/report.html").read_text()


def test_masks_below_the_threshold_are_emptied_and_counted_so_and_all_others_stay(
    lab: Path, done: dict[str, Scores]
) -> None:
    before, after = done["scored"], done["calibrated"]
    assert after.presence is not None and before.presence is None and after.presences == before.presences
    below = {key for key, number in before.presences.items() if number < after.presence["threshold"]}
    assert 0 < len(below) < len(before.presences)
    for key in before.presences:
        if key in below:
            assert not any(mask.any() for mask in masks(lab / "calibrated", key))
            assert has_target(key) or after.per_expression[key] == {"j": 100, "f": 100, "jf": 100}
        else:
            files = [contents(lab / name / "masks" / key) for name in ("out_scored", "calibrated")]
            assert files[0] == files[1] and after.per_expression[key] == before.per_expression[key]
    said = {key: any(mask.any() for mask in masks(lab / "calibrated", key)) for key in before.presences}
    nothing = [not answer for key, answer in said.items() if not has_target(key)]
    target = [answer for key, answer in said.items() if has_target(key)]
    assert after.nothing["n_acc"] == pytest.approx(100 * np.mean(nothing))
    assert after.nothing["t_acc"] == pytest.approx(100 * np.mean(target))


def test_the_threshold_of_an_evaluation_does_in_another_one_what_it_did_there(
    lab: Path, done: dict[str, Scores]
) -> None:
    first, again = done["calibrated"], done["scored again"]
    assert contents(lab / "calibrated/masks") == contents(lab / "again/masks")
    assert (again.presence, again.totals, again.nothing) == (first.presence, first.totals, first.nothing)


def test_without_a_threshold_nothing_of_it_is_in_the_results_but_the_numbers_to_choose_one_by(
    lab: Path, done: dict[str, Scores]
) -> None:
    written = json.loads((lab / "out_scored/scores.json").read_text())
    assert written["presence_threshold"] is None and written["presence"] is None
    assert written["presences"] == done["scored"].presences and written["presences"].keys() == set(
        written["per_expression"]
    )
    assert "Presence" not in (lab / "out_scored/report.html").read_text()


def test_the_fingerprint_knows_thresholds_by_their_value_and_is_what_it_was_without(
    lab: Path, done: dict[str, Scores], tmp_path: Path
) -> None:
    def of(asked: EvaluateConfig) -> str:
        return fingerprint_now(asked, weights=done["scored"].weights, wan_files=folder_state(lab / "golden/wan"))

    plain, other = config(lab, tmp_path), {"data": named(lab, "others")}
    assert of(plain) == of(config(lab, tmp_path, presence="none", calibrate=other)) == done["scored"].fingerprint
    assert of(calibrating(lab, tmp_path)) == done["calibrated"].fingerprint
    (tmp_path / "copy").mkdir()
    written = json.loads((lab / "calibrated/scores.json").read_text())
    for threshold in (written["presence"]["threshold"], 0.5):
        written["presence"]["threshold"] = threshold
        (tmp_path / "copy/scores.json").write_text(json.dumps(written))
        now = of(config(lab, tmp_path, presence=str(tmp_path / "copy")))
        assert (now == done["scored again"].fingerprint) == (threshold != 0.5)
    assert len({one.fingerprint for name, one in done.items() if not name.startswith("others")}) == 3


def _judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects one entry for each video that is encoded from now on."""
    seen: list[int] = []
    encode = Segmenter.encode_video
    monkeypatch.setattr(Segmenter, "encode_video", lambda self, signed: seen.append(1) or encode(self, signed))
    return seen


def stopping(what: str, done: int) -> Callable[[str, int, int], None]:
    def stop(now: str, number: int, _total: int) -> None:
        if (now, number) == (what, done):
            raise KeyboardInterrupt

    return stop


def test_a_stopped_calibration_goes_on_and_ends_as_if_it_never_was(
    lab: Path, done: dict[str, Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, encoded = calibrating(lab, tmp_path / "e"), _judged(monkeypatch)
    for what, number in (("calibrate", 1), ("calibrate", 2), ("videos", 1)):
        with pytest.raises(KeyboardInterrupt):
            evaluate(asked, on_progress=stopping(what, number))
    assert evaluate(asked) == done["calibrated"]
    assert len(encoded) == 5, "two to calibrate on, two to score, of which one was at work when the other was whole"
    assert contents(tmp_path / "e/masks") == contents(lab / "calibrated/masks")
    assert not [path for path in (tmp_path / "e/.evaluate").rglob("*") if path.suffix == ".json"]


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_two_processes_take_one_threshold_and_end_as_one_does(
    lab: Path, done: dict[str, Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    asked, encoded = calibrating(lab, tmp_path / "e"), _judged(monkeypatch)
    assert evaluate(asked, rank=order[0], world=2) is None
    noted = list((tmp_path / "e/.evaluate").glob("*/calibration/*.json"))
    for path in noted:  # the choice stays, even if the numbers behind it change
        path.write_text(json.dumps({"judged": [{"presence": 0.0, "answered": True, "has_target": True}]}))
    assert evaluate(asked, rank=order[1], world=2) == done["calibrated"]
    assert (len(noted), len(encoded)) == (2, 4), "no video is judged twice"


def test_every_process_reaches_every_video_once_and_its_own_first() -> None:
    for world in range(1, 6):
        for count in range(9):
            numbers: Any = list(range(count))
            for rank in range(world):
                order: Any = list(_own_first(numbers, rank=rank, world=world))
                own = numbers[rank::world]
                assert sorted(order) == numbers and order[: len(own)] == own


def test_what_no_threshold_can_be_chosen_on_is_one_line_before_anything_is_written(
    lab: Path, done: dict[str, Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmask.trainer.score.evaluate.load_segmenter", None)
    write_some_naming_nothing(tmp_path / "shared", {"two": "vidB", "five": "vidB"}, TEXTS)
    write_some_naming_nothing(tmp_path / "target", {"six": "vidB"}, TEXTS[:1])
    write_some_naming_nothing(tmp_path / "unknown", {"seven": "vidB"}, TEXTS)
    (tmp_path / "unknown/valid_u/mask_dict.json").unlink()
    path = write_some_naming_nothing(tmp_path / "nothing", {"eight": "vidB"}, TEXTS) / "valid_u/meta_expressions.json"
    meta = json.loads(path.read_text())
    for entry in meta["videos"]["eight"]["expressions"].values():
        entry["anno_id"] = []
    path.write_text(json.dumps(meta))
    cases = {
        "shared": r"shares 1 videos with data \(two\).*give another split",
        "target": "no sentence names nothing",
        "nothing": "no sentence names something",
        "unknown": "video seven has no true masks",
    }
    for name, message in cases.items():
        asked = config(lab, tmp_path / "e", calibrate={"enabled": True, "data": named(tmp_path, name)})
        with pytest.raises(ConfigError, match=rf"calibrate\.data is valid_u of {tmp_path / name}.*{message}") as caught:
            evaluate(asked)
        assert "\n" not in str(caught.value) and not (tmp_path / "e").exists()
    with pytest.raises(ValidationError, match=r"calibrate\.data is missing"):
        config(lab, tmp_path / "e", calibrate={"enabled": True})
    with pytest.raises(
        ValidationError, match=r"presence is x, but calibrate\.enabled also chooses a threshold; give one"
    ):
        calibrating(lab, tmp_path / "e", presence="x")


def test_a_threshold_of_other_weights_is_not_used(lab: Path, done: dict[str, Scores], tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mask_decoder": "vae"}, "mask_decoder .* there, vae here"),
        ({"sampler": {"steps": 2}}, r"sampler\.steps 1 there, 2 here"),
        ({"box": {"height_px": 16, "width_px": 48}}, "box 32x48 .* there, 16x48"),
    ]
    for changed, message in cases:
        with pytest.raises(ConfigError, match=message):
            evaluate(config(lab, tmp_path / "e", presence=str(lab / "calibrated"), **changed))
        assert not (tmp_path / "e").exists()


def test_an_export_with_a_threshold_is_evaluated_with_it(lab: Path, done: dict[str, Scores], tmp_path: Path) -> None:
    from flowmask.trainer.predict.export import export

    golden = str(lab / "golden/export")
    made = export(golden, format="safetensors", out=tmp_path / "w.safetensors", presence=str(lab / "calibrated")).path
    same: dict[str, Any] = {
        "checkpoint": str(made),
        "mask_decoder": str(lab / "golden/decoder.pth"),
        "model": {"wan": lab / "golden/wan"},
    }
    said: list[str] = []
    found = scored(config(lab, tmp_path / "e", **same), say=said.append)
    assert found.presence == done["calibrated"].presence and any("presence=none" in line for line in said)
    assert sum("was chosen on mevis valid_u: if on the same videos" in line for line in said) == 1
    assert contents(tmp_path / "e/masks") == contents(lab / "calibrated/masks")
    asked = config(lab, tmp_path / "e", **same)
    wan_files = folder_state(lab / "golden/wan")
    assert fingerprint_now(asked, weights=found.weights, wan_files=wan_files) == found.fingerprint
