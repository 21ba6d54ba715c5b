"""Pages that commands write are readable: in narrow and wide windows, in light and dark mode.

FLOWMASK_PICTURES=DIR keeps a picture of each.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import flowmask

WINDOWS = [(width, scheme) for width in (400, 1100, 1600) for scheme in ("light", "dark")]
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3, level AA
# Texts with too little contrast, after mixing their colour with all backgrounds behind them.
FAINT = """least => {
  const luminance = ([r, g, b]) => [[r, .2126], [g, .7152], [b, .0722]].reduce((sum, [part, weight]) =>
    sum + weight * (part <= 10.3 ? part / 3294.6 : ((part / 255 + .055) / 1.055) ** 2.4), 0);
  const parts = colour => { const n = colour.match(/[\\d.]+/g).map(Number); return n.length == 3 ? [...n, 1] : n };
  const over = ([r, g, b, a], below) => [r, g, b].map((part, i) => a * part + (1 - a) * below[i]);
  const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
  const seen = (element, ink) => {
    const outer = [];
    for (let one = element; one; one = one.parentElement) outer.unshift(one);
    let below = canvas, opacity = 1;
    for (const one of outer) {
      const style = getComputedStyle(one);
      opacity *= style.opacity;
      below = over(parts(style.backgroundColor), below);
    }
    const [r, g, b, a] = parts(ink);
    return [over([r, g, b, a * opacity], below), below];
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].filter(node => node.nodeType == 3 && node.data.trim());
    if (!own.length || element.closest("script, style, svg")) continue;
    const [ink, below] = seen(element, getComputedStyle(element).color).map(luminance);
    const contrast = (Math.max(ink, below) + .05) / (Math.min(ink, below) + .05);
    if (contrast < least) faint.push(`${own[0].data.trim().slice(0, 40)}: ${contrast.toFixed(1)}`);
  }
  return faint;
}"""


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
        page = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(pages[name].as_uri())
        return page

    yield show
    assert said == []


@pytest.mark.parametrize("name", ["report", "inspect", "compare", "run"])
def test_a_page_fits_its_window_shows_every_picture_and_its_texts_stand_out(name: str, shown: Any) -> None:
    for width, scheme in WINDOWS:
        page = shown(name, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert page.evaluate(FAINT, LEAST_CONTRAST) == [], (width, scheme)
        if "FLOWMASK_PICTURES" in os.environ:
            path = Path(os.environ["FLOWMASK_PICTURES"]) / f"{name}-{width}-{scheme}.png"
            page.screenshot(path=path, full_page=True)
        page.context.close()


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
