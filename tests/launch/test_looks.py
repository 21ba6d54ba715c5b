"""Pages that commands write are readable: in narrow and wide windows, in light and dark mode."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import flowmask
from looks import look_at, opened


@pytest.fixture(scope="module")
def pages(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each command that writes a page of a cache, of scores or of a run."""
    folder = tmp_path_factory.mktemp("pages")
    evaluation, inspected, compared = smoke / "evaluate", folder / "inspect.html", folder / "compare.html"
    trained = folder / "run.html"
    for words in (
        ("cache", "inspect", smoke / "cache", "--out", inspected, "--examples", 2),
        ("compare", evaluation, evaluation / "scores.json", "--out", compared),
        ("report", smoke / "runs" / "dit", "--out", trained),
    ):
        done = flowmask(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    return {"report": evaluation / "report.html", "inspect": inspected, "compare": compared, "run": trained}


@pytest.fixture(scope="module")
def shown(pages: dict[str, Path], chromium: Any) -> Iterator[Any]:
    """Opens a page in a window; errors of its scripts fail the test at the end."""
    said: list[str] = []

    def show(name: str, width: int = 1100, scheme: str = "light") -> Any:
        return opened(chromium, pages[name], said, width=width, scheme=scheme)

    yield show
    assert said == []


@pytest.mark.parametrize("name", ["report", "inspect", "compare", "run"])
def test_a_page_fits_its_window_shows_every_picture_and_its_texts_stand_out(name: str, shown: Any) -> None:
    look_at(name, lambda width, scheme: shown(name, width, scheme))


def test_a_click_on_a_title_sorts_by_value_and_another_one_turns_it_round(shown: Any) -> None:
    page = shown("report")
    table = page.locator("table.sortable").last
    column = table.locator("tbody td:nth-child(1)")
    title = table.locator("thead button").first
    title.click()
    rising = [float(text) for text in column.all_inner_texts()]
    title.click()
    falling = [float(text) for text in column.all_inner_texts()]
    assert rising == sorted(rising) and falling == sorted(rising, reverse=True) and rising[0] < rising[-1]
    page.context.close()


def test_no_picture_is_shown_twice_on_the_page_of_a_cache(shown: Any) -> None:
    page = shown("inspect")
    blocks = page.evaluate(
        "[...document.querySelectorAll('figure')].map(one => one.querySelector('figcaption').textContent)"
    )
    assert len(blocks) == len(set(blocks)) == 2
    page.context.close()


def test_a_report_says_of_which_dataset_split_weights_and_code_and_when(shown: Any) -> None:
    page = shown("report")
    said = dict(
        page.evaluate("[...document.querySelectorAll('.pairs tr')].map(row => [...row.cells].map(c => c.textContent))")
    )
    assert said.keys() >= {"Dataset", "Split", "Checkpoint", "Step", "Commit of the code", "Date"}
    assert all(said.values())
    page.context.close()
