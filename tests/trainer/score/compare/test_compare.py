"""`flowmask compare`: paired differences against hand counts, its page, and its refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from golden_export import DATA
from PIL import Image

from flowmask.launch.cli.compare import compare as command
from flowmask.models.errors import ConfigError
from flowmask.trainer.score.compare.comparison_page import page_file, write_page
from flowmask.trainer.score.compare.differences import compare
from flowmask.trainer.score.intervals import Drawable, intervals

META = json.loads((DATA / "valid_u" / "meta_expressions.json").read_text())["videos"]
KEYS = [f"{video}/{number}" for video, entry in META.items() for number in entry["expressions"]]


def evaluation(folder: Path, jf: dict[str, float], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    each = {key: {"j": value / 2, "f": value, "jf": value} for key, value in jf.items()}
    held = {"videos": 2, "expressions": len(jf), "weights": {}, "per_expression": each}
    (folder / "scores.json").write_text(json.dumps(held | changes))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two evaluations of the golden dataset; the second is better by 10, and by 60 at the last expression."""
    first = {key: 20.0 + place for place, key in enumerate(KEYS)}
    other = {key: value + (60 if key == KEYS[-1] else 10) for key, value in first.items()}
    return [evaluation(tmp_path / "a", first), evaluation(tmp_path / "b", other)]


def with_masks(folder: Path) -> None:
    data = {"source": "mevis", "root": str(DATA), "split": "valid_u"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"checkpoint": "run", "data": data}))
    for key in KEYS:
        place = folder / "masks" / key
        place.mkdir(parents=True)
        frames = META[key.split("/")[0]]["frames"]
        with Image.open(next((DATA / "valid_u/JPEGImages" / key.split("/")[0]).iterdir())) as frame:
            size = frame.size
        for name in frames:
            Image.fromarray(np.full(size[::-1], 255, np.uint8)).save(place / f"{name}.png")


def test_differences_are_means_over_the_expressions_in_common_with_intervals_over_videos(tmp_path: Path) -> None:
    one = {"a/0": 10.0, "a/1": 20.0, "b/0": 30.0, "c/0": 99.0, "c/1": 98.0}
    two = {"a/0": 15.0, "b/0": 20.0, "a/1": 21.0, "d/0": 0.0}
    (found,) = compare([evaluation(tmp_path / "a", one), evaluation(tmp_path / "b", two) / "scores.json"])
    assert found.shared == [("a", "0"), ("a", "1"), ("b", "0")]
    assert found.metrics.keys() == {"j", "f", "jf"}
    jf = found.metrics["jf"]
    assert (jf.first, jf.other, jf.value) == (20, pytest.approx(56 / 3), pytest.approx(-4 / 3))
    drawn = [Drawable("a", {"jf": 5.0}), Drawable("a", {"jf": 1.0}), Drawable("b", {"jf": -10.0})]
    assert jf.interval == intervals(drawn, seed=0)["jf"]
    assert found.counts(first="A", other="B") == ("3 expressions of 2 videos are in both; 2 only in A, 1 only in B")


def test_n_acc_is_compared_over_the_expressions_of_which_both_tell_that_they_name_nothing(tmp_path: Path) -> None:
    scores = dict.fromkeys(("a/0", "a/1", "b/0", "c/0"), 50.0)
    one = evaluation(tmp_path / "a", scores, left_empty={"a/0": False, "b/0": True, "c/0": False})
    two = evaluation(tmp_path / "b", scores, left_empty={"a/0": True, "b/0": True, "z/9": True})
    older = evaluation(tmp_path / "older", scores)
    (found,) = compare([one, two])
    n_acc = found.metrics["n_acc"]
    assert [*found.metrics][-1] == "n_acc" and (n_acc.first, n_acc.other, n_acc.value) == (50, 100, 50)
    drawn = [Drawable("a", {"n": 100.0}), Drawable("b", {"n": 0.0}), *[Drawable("a", {}), Drawable("c", {})]]
    assert n_acc.interval == intervals(drawn, seed=0)["n"]
    assert all("n_acc" not in compare(pair)[0].metrics for pair in ([one, older], [older, two]))


def test_an_evaluation_differs_from_itself_by_nothing_and_swapped_ones_by_the_opposite(two: list[Path]) -> None:
    (same,) = compare([two[0], two[0]])
    assert {one.value for one in same.metrics.values()} == {0}
    (there,), (back,) = compare(two), compare(two[::-1])
    assert there.metrics["jf"].value == -back.metrics["jf"].value > 0
    assert [len(compare([*two, *two])), compare([*two, two[0]])[1].metrics["jf"].value] == [3, 0]


def test_expressions_are_paired_by_their_ids_and_not_by_how_their_masks_are_called(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "a", {"x%2fy/0": 1.0, "b/0": 3.0}, ids={"x%2fy/0": ["x/y", "0"]})
    two = evaluation(tmp_path / "b", {"other/0": 5.0, "b/0": 3.0}, ids={"other/0": ["x/y", "0"]})
    (found,) = compare([one, two])
    assert found.shared == [("x/y", "0"), ("b", "0")] and found.metrics["jf"].value == 2


REFUSED = {
    "nothing there": (lambda folder: folder / "gone", "is not an evaluation"),
    "another folder": (lambda folder: folder, "is not an evaluation"),
    "no JSON": (lambda folder: evaluation(folder / "e", {"a/0": 1.0}) / "scores.json", "or is damaged"),
    "no scores.json": (lambda folder: evaluation(folder / "e", {}, weights=1), "holds no score"),
    "no masks": (lambda folder: evaluation(folder / "e", {}), "holds no score"),
    "no numbers": (lambda folder: evaluation(folder / "e", {}, per_expression={"a/0": {"jf": "x"}}), "is damaged"),
    "a way out": (lambda folder: evaluation(folder / "e", {}, per_expression={"../x": {"jf": 1}}), "is damaged"),
    "no main metric": (lambda folder: evaluation(folder / "e", {}, per_expression={KEYS[0]: {"j": 1}}), "jf"),
    "nothing in common": (lambda folder: evaluation(folder / "e", {"q/0": 1.0}), "no expression in common"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line(two: list[Path], tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    other = make(tmp_path)
    if name == "no JSON":
        other.write_text(other.read_text()[:-9])
    for paths in ([two[0], other], [other, two[0]]):
        with pytest.raises(ConfigError, match=message) as caught:
            compare(paths)
        assert "\n" not in str(caught.value)


def test_one_evaluation_alone_is_refused(two: list[Path]) -> None:
    with pytest.raises(ConfigError, match="two or more are needed"):
        compare(two[:1])


def test_the_page_shows_what_changed_most_with_sentences_frames_and_masks(two: list[Path], tmp_path: Path) -> None:
    for folder in two:
        with_masks(folder)
    write_page(page_file(tmp_path / "page.html"), compare(two))
    page = (tmp_path / "page.html").read_text()
    assert page.count("<circle") == page.count("<figure>") == len(KEYS)
    assert page.index("change +60.00") < page.index("change +10.00")
    assert page.count("the dog running to the left") == 2 * 3, "in the scatter, the sheet and the table"
    assert all(page.count(f"<i>{row}</i>") == len(KEYS) for row in ("frame", "true", "A", "B"))
    assert "http" not in page


def test_without_dataset_or_masks_the_page_has_the_numbers_and_says_what_is_missing(
    two: list[Path], tmp_path: Path
) -> None:
    write_page(page_file(tmp_path / "page.html"), compare(two))
    page = (tmp_path / "page.html").read_text()
    assert page.count("<circle") == len(KEYS) and "<figure>" not in page
    assert "the dataset is out of reach" in page
    with_masks(two[0])
    write_page(page_file(tmp_path / "page.html"), compare(two))
    page = (tmp_path / "page.html").read_text()
    assert "the dataset is out of reach" not in page
    assert page.count("<i>A</i>") == len(KEYS) and "<i>B</i>" not in page


def test_a_page_takes_the_place_of_an_earlier_one_and_of_nothing_else(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="no page of compared evaluations"):
        page_file(out).refuse()
    assert out.read_text() == "mine"


def test_the_command_prints_a_table_and_writes_the_page(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(two, out=tmp_path / "page.html")
    said = capsys.readouterr().out
    assert "0 only in A, 0 only in B" in said and "J&F" in said and "+10.00 to +" in said
    assert (tmp_path / "page.html").is_file()
    command([*two, two[0]], out=None)
    assert "C - A" in capsys.readouterr().out
