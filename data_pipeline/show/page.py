"""One self-contained HTML page: tiles, tables, bars, contact sheets.

It has no address outside the file, so a page can be mailed or stored anywhere. Its only script sorts tables; without
it nothing is lost. Knows nothing of caches or models; escapes all text.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.show.paint import CELL_PX, Rgb, embedded


@dataclass(frozen=True)
class Cell:
    """A cell of a table; value: a number to sort by; bar: its length in percent; head: whether it names the row."""

    text: str
    value: float | None = None
    bar: float | None = None
    head: bool = False

    @property
    def is_number(self) -> bool:
        return self.value is not None and not self.head


def document(title: str, body: Sequence[str]) -> str:
    """The whole file; `body` has the parts below the title, made by the functions here."""
    text = html.escape(title)
    head, tail = _PAGE.split("{body}")
    script = [_SORT] if any(_SORTABLE in part for part in body) else []
    return head.replace("{title}", text) + "\n".join([f"<h1>{text}</h1>", *body, *script]) + tail


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def subheading(text: str) -> str:
    return f"<h3>{html.escape(text)}</h3>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph that is easy to see."""
    return f"<p class=note>{html.escape(text)}</p>"


def tiles(facts: Mapping[str, str]) -> str:
    """Name -> value, as a row of tiles."""
    made = (f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in facts.items())
    return f"<section class=tiles>{''.join(made)}</section>"


def pairs(rows: Mapping[str, str]) -> str:
    """Name -> value, as a table of two columns."""
    lines = (f"<tr><th>{html.escape(k)}<td>{html.escape(v)}" for k, v in rows.items())
    return f"<table class=pairs>{''.join(lines)}</table>"


def bars(rows: Mapping[str, tuple[float, str]]) -> str:
    """Name -> (length, text on the bar), as horizontal bars."""
    largest = max((length for length, _ in rows.values()), default=0) or 1
    lines = (
        f'<tr><th>{html.escape(name)}<td class=bar style="--part:{length / largest:.1%}">{html.escape(value)}'
        for name, (length, value) in rows.items()
    )
    return f"<table class=pairs>{''.join(lines)}</table>"


def table(titles: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table that a click on a column title sorts; numbers are right-aligned."""
    numbers = [cell.is_number for cell in rows[0]] if rows else [False] * len(titles)
    heads = zip(titles, numbers, strict=True)
    head = "".join(f"<th{' class=number' if number else ''}>{html.escape(title)}" for title, number in heads)
    lines = ("<tr>" + "".join(map(_cell, row)) for row in rows)
    return f"<div class=wide>{_SORTABLE}<thead><tr>{head}<tbody>\n" + "\n".join(lines) + "</table></div>"


def _cell(cell: Cell) -> str:
    classes = " ".join(["number"] * cell.is_number + ["bar"] * (cell.bar is not None))
    said = f' class="{classes}"' if classes else ""
    bar = f' style="--part:{min(100.0, max(0.0, cell.bar)):.1f}%"' if cell.bar is not None else ""
    value = f" data-value={cell.value:.9g}" if cell.value is not None else ""
    return f"<{'th' if cell.head else 'td'}{said}{bar}{value}>{html.escape(cell.text)}"


def legend(colours: Mapping[str, Rgb | None]) -> str:
    """The meaning of colours: a patch of each (None: a darkened patch) and its text."""
    patches = (
        f'<span><b style="background:{f"rgb{tone}" if tone else "#0008"}"></b>{html.escape(meaning)}</span>'
        for meaning, tone in colours.items()
    )
    return f"<p class=legend>{''.join(patches)}</p>"


def side_by_side(parts: Sequence[str]) -> str:
    """Parts in a row, wrapped where the window is narrow."""
    return f"<div class=side>{''.join(f'<div>{part}</div>' for part in parts)}</div>"


def sheet(
    caption: str,
    *,
    detail: str,
    rows: Mapping[str, Sequence[NDArray[np.uint8]]],
    columns: Sequence[str],
    below: str = "",
) -> str:
    """One block of a contact sheet: a sentence, rows of pictures (label -> uint8 [H W 3] each), column names."""
    cells = []
    for label, pictures in rows.items():
        text = html.escape(label)
        cells.append(f"<i>{text}</i>")
        cells += [f'<img alt="{text}" src="{embedded(picture)}">' for picture in pictures]
    names = "".join(f"<span class=name>{html.escape(name)}</span>" for name in columns)
    return (
        f"<figure><figcaption>“{html.escape(caption)}” <small>{html.escape(detail)}</small></figcaption>"
        f'<div class=wide><div class=grid style="--columns:{len(columns)}">{"".join(cells)}<i></i>{names}</div></div>'
        + (f"<p class=below>{html.escape(below)}</p>" if below else "")
        + "</figure>"
    )


def spread(count: int, at_most: int) -> list[int]:
    """At most `at_most` indices of 0..count-1, evenly spread, with the first and the last."""
    if count <= at_most:
        return list(range(count))
    return [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)] if at_most > 1 else [0]


_SORTABLE = "<table class=sortable>"
_SORT = """<script>
for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  titles.forEach((title, place) => {
    const button = document.createElement("button");
    button.append(...title.childNodes);
    title.append(button);
    button.onclick = () => {
      const down = title.getAttribute("aria-sort") == "ascending", sign = down ? -1 : 1;
      const rows = [...body.rows].map(row => [row.cells[place], row]);
      rows.sort(([one], [other]) => sign * ("value" in one.dataset && "value" in other.dataset
        ? one.dataset.value - other.dataset.value
        : one.textContent.localeCompare(other.textContent, undefined, {numeric: true})));
      titles.forEach(other => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows.map(([, row]) => row));
    };
  });
}
</script>"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bar: #3a8ee655; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .8rem } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem }
h1, h2, h3, p, figcaption { overflow-wrap: anywhere }
.note { border-left: 4px solid #e66100; padding: .3rem .8rem; background: var(--soft) }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem }
.tiles div { background: var(--soft); border-radius: 8px; padding: .6rem 1rem; min-width: 6rem }
.tiles b { display: block; font-size: 1.25rem; overflow-wrap: anywhere }
.tiles span { opacity: .7; font-size: .85rem }
figure { margin: 0 0 1.6rem } figcaption { margin-bottom: .4rem; font-weight: 600 }
small { font-weight: 400; opacity: .7; margin-left: .5rem }
.wide { overflow-x: auto; max-width: 100% }
.grid { display: grid; gap: 3px; grid-template-columns: 5rem repeat(var(--columns), minmax(88px, CELLpx)) }
.grid i { font-style: normal; font-size: .8rem; opacity: .7; align-self: center }
.grid img { width: 100%; display: block; border-radius: 3px }
.name { font-size: .75rem; opacity: .6; text-align: center; overflow: hidden; text-overflow: ellipsis }
.below { margin: .3rem 0 0 5rem; font-size: .85rem; opacity: .75 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
.pairs th { font-weight: 400; opacity: .7; white-space: nowrap; width: 1% }
.pairs td { overflow-wrap: anywhere }
.bar { background: linear-gradient(90deg, var(--bar) var(--part), transparent var(--part)); min-width: 5rem }
.number { text-align: right; white-space: nowrap }
.sortable thead th { vertical-align: bottom } .sortable tbody th { font-weight: 400 }
.sortable button { all: unset; cursor: pointer; font-weight: 600 }
.sortable button:hover, .sortable button:focus-visible { text-decoration: underline }
.sortable button::after { content: "\\a0↕"; opacity: .35; font-weight: 400 }
[aria-sort=ascending] button::after { content: "\\a0↑"; opacity: 1 }
[aria-sort=descending] button::after { content: "\\a0↓"; opacity: 1 }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; font-size: .9rem }
.legend b { display: inline-block; width: 1rem; height: 1rem; border: 1px solid #000; outline: 1px solid #fff;
  margin-right: .5rem; vertical-align: -.15rem }
.scatter { display: block; width: 100%; max-width: 480px; font-size: 11px; fill: currentColor }
.scatter path { fill: none; stroke: currentColor; opacity: .4 }
.scatter circle { fill: #3a8ee6; fill-opacity: .55; stroke: #fff; stroke-width: .6 }
.side { display: flex; flex-wrap: wrap; gap: 1rem 3rem } .side > div { flex: 1; min-width: min(24rem, 100%) }
@media (max-width: 600px) {
  body { margin: 1rem auto } th, td { padding: .25rem .3rem } table { font-size: .85rem } .bar { min-width: 2.5rem }
  .grid { grid-template-columns: 3.8rem repeat(var(--columns), minmax(88px, CELLpx)) }
}
</style></head>
<body>
{body}
</body></html>
""".replace("CELL", str(CELL_PX))
