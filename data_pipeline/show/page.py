"""One HTML page that carries everything it shows: tiles, tables, bars, contact sheets.

No script and no address outside the file, so a page can be mailed or kept beside what it is about. Knows
nothing of caches or models; escapes all text.
"""

import html
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.show.paint import CELL_PX, embedded


def document(title: str, body: Sequence[str]) -> str:
    """The whole file; `body` are the parts below the title, from the functions here."""
    text = html.escape(title)
    head, tail = _PAGE.split("{body}")
    return head.replace("{title}", text) + "\n".join([f"<h1>{text}</h1>", *body]) + tail


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph that must not be overlooked."""
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
    """Name -> (length, what stands on the bar), as horizontal bars."""
    largest = max((length for length, _ in rows.values()), default=0) or 1
    lines = (
        f'<tr><th>{html.escape(name)}<td class=bar style="--part:{length / largest:.1%}">{html.escape(value)}'
        for name, (length, value) in rows.items()
    )
    return f"<table class=pairs>{''.join(lines)}</table>"


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
        f'<div class=grid style="--columns:{len(columns)}">{"".join(cells)}<i></i>{names}</div>'
        + (f"<p class=below>{html.escape(below)}</p>" if below else "")
        + "</figure>"
    )


def spread(count: int, at_most: int) -> list[int]:
    """At most `at_most` indices of 0..count-1, evenly spread, the first and the last among them."""
    if count <= at_most:
        return list(range(count))
    return [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)] if at_most > 1 else [0]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bar: #3a8ee655; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .8rem } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
.note { border-left: 4px solid #e66100; padding: .3rem .8rem; background: var(--soft) }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem }
.tiles div { background: var(--soft); border-radius: 8px; padding: .6rem 1rem; min-width: 6rem }
.tiles b { display: block; font-size: 1.25rem; overflow-wrap: anywhere }
.tiles span { opacity: .7; font-size: .85rem }
figure { margin: 0 0 1.6rem } figcaption { margin-bottom: .4rem; font-weight: 600 }
small { font-weight: 400; opacity: .7; margin-left: .5rem }
.grid { display: grid; gap: 3px; grid-template-columns: 5rem repeat(var(--columns), minmax(0, CELLpx)) }
.grid i { font-style: normal; font-size: .8rem; opacity: .7; align-self: center }
.grid img { width: 100%; display: block; border-radius: 3px }
.name { font-size: .75rem; opacity: .6; text-align: center; overflow: hidden; text-overflow: ellipsis }
.below { margin: .3rem 0 0 5rem; font-size: .85rem; opacity: .75 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
.pairs th { font-weight: 400; opacity: .7; white-space: nowrap; width: 1% }
.pairs td { overflow-wrap: anywhere }
.bar { background: linear-gradient(90deg, var(--bar) var(--part), transparent var(--part)); min-width: 5rem }
.side { display: flex; flex-wrap: wrap; gap: 0 3rem } .side > div { flex: 1; min-width: 15rem }
</style></head>
<body>
{body}
</body></html>
""".replace("CELL", str(CELL_PX))
