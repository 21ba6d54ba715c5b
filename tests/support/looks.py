"""Checks of a page in a real browser: in narrow and wide windows, in light and dark mode.

FLOWMASK_PICTURES=DIR keeps a picture of each.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def look_at(name: str, show: Callable[[int, str], Any]) -> None:
    """The page fits each window, shows every picture, and its texts have enough contrast; `show` opens a window."""
    for width, scheme in WINDOWS:
        page = show(width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert page.evaluate(FAINT, LEAST_CONTRAST) == [], (width, scheme)
        if "FLOWMASK_PICTURES" in os.environ:
            path = Path(os.environ["FLOWMASK_PICTURES"]) / f"{name}-{width}-{scheme}.png"
            page.screenshot(path=path, full_page=True)
        page.context.close()


def opened(chromium: Any, path: Path, said: list[str], *, width: int, scheme: str) -> Any:
    """The page in a new window with a fresh profile; `said` collects the output and errors of its scripts."""
    page = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    return page
