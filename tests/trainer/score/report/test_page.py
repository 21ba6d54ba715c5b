"""The HTML report of an evaluation."""

import re
from pathlib import Path

import numpy as np
import pytest

from flowmask.data_pipeline.show.page import spread
from flowmask.trainer.score.metrics import shown_in
from flowmask.trainer.score.report.page import ReportExample, ReportRow, with_interval, write_report


def _example(*, true: bool = True) -> ReportExample:
    frames = [np.full((20, 30, 3), 40 * i, np.uint8) for i in range(3)]
    mask = np.zeros((3, 20, 30), bool)
    mask[:, 5:10, 5:10] = True
    return ReportExample("v/0", 'a <b> & "c"', "J&F 50.0", ["0", "1", "2"], frames, mask if true else None, ~mask)


METRICS = {name: metric for name, metric in shown_in("report").items() if name != "f"}


def _written(path: Path, **changes: object) -> str:
    settings: dict = {
        "title": "T",
        "facts": {"J&F": "50.0"},
        "made_from": {"Split": "valid"},
        "metrics": METRICS,
        "rows": [],
        "slices": {},
        "examples": {"Worst": [_example()]},
    } | changes
    write_report(path / "report.html", **settings)
    return (path / "report.html").read_text()


def test_a_report_is_one_file_that_asks_for_nothing_outside_itself(tmp_path: Path) -> None:
    page = _written(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 9 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "http" not in page and "url(" not in page and "@import" not in page


def test_sentences_are_escaped(tmp_path: Path) -> None:
    page = _written(tmp_path, rows=[ReportRow("v/0", "<script>x</script>", {"jf": 1.5, "j": 1})])
    assert "a &lt;b&gt; &amp;" in page
    assert "<script>x" not in page and "&lt;script&gt;x" in page


def test_the_table_lists_every_expression_lowest_first(tmp_path: Path) -> None:
    rows = [ReportRow(f"v/{i}", "s", {"jf": 10.0 * i, "j": 10.0 * i}) for i in (3, 1, 2)]
    assert re.findall(r"<td>(v/\d)<td>s", _written(tmp_path, rows=rows)) == ["v/1", "v/2", "v/3"]


def test_a_slice_is_a_table_of_its_buckets_in_their_order_with_values_to_sort_by(tmp_path: Path) -> None:
    buckets = {name: {"jf": jf, "j": 1.25, "expressions": 1234} for name, jf in (("1 to 24", 60.0), ("25 to 48", 5.5))}
    page = _written(tmp_path, slices={"video_frames": buckets})
    assert re.findall(r"<th data-value=(\d)>(\d+ to \d+)", page) == [("0", "1 to 24"), ("1", "25 to 48")]
    assert "data-value=5.5>5.5<" in page and "data-value=1234>1,234" in page
    assert page.count("<script>") == 1 and "<script" not in _written(tmp_path)


def test_intervals_stand_beside_their_values() -> None:
    metric = METRICS["jf"]
    assert with_interval(metric, 50.04, [40.0, 60.06]) == "50.0 (40.0–60.1)"
    assert with_interval(metric, 50.04, None) == "50.0"


def test_the_report_says_how_examples_were_chosen_and_what_the_colours_mean(tmp_path: Path) -> None:
    page = _written(tmp_path, examples={"Worst: the lowest": [_example()], "Random: drawn": [_example()]})
    assert "<h3>Worst: the lowest</h3>" in page and "<h3>Random: drawn</h3>" in page
    assert page.count("class=legend") == 1 and "</b>true mask" in page
    assert "</b>true mask" not in _written(tmp_path, examples={"Random": [_example(true=False)]})


def test_without_true_masks_the_sheet_shows_frames_and_predictions_only(tmp_path: Path) -> None:
    page = _written(tmp_path, examples={"Random": [_example(true=False)]}, note="no score is possible")
    assert page.count("<img") == 6
    assert "no score is possible" in page


@pytest.mark.parametrize(("count", "at_most"), [(1, 6), (6, 6), (7, 6), (100, 6), (5, 1), (0, 3)])
def test_spread_keeps_the_ends_and_never_repeats(count: int, at_most: int) -> None:
    chosen = spread(count, at_most)
    assert len(chosen) == min(count, at_most) == len(set(chosen))
    assert chosen == sorted(chosen)
    if count and at_most > 1:
        assert (chosen[0], chosen[-1]) == (0, count - 1)
