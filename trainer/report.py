"""A report of an evaluation as one HTML file: scores and a contact sheet of frames, true and predicted masks.

Self-contained: images are embedded, no script and no address outside the file, so it can be mailed or kept
with the run. Knows nothing of datasets or models; the caller hands it rows and pictures. Text is escaped.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.overlay import Rgb, paint
from trainer.run_folder import write_atomically

TRUE_COLOUR: Rgb = (60, 190, 90)
PREDICTED_COLOUR: Rgb = (230, 97, 0)
_CELL_PX = 160  # width of one picture of the contact sheet
_DIM = 0.45


@dataclass(frozen=True)
class ReportRow:
    """One line of the score table; scores in 0..100."""

    key: str
    sentence: str
    j: float
    f: float
    jf: float


@dataclass(frozen=True)
class ReportExample:
    """One block of the contact sheet: the same few frames of one expression.

    frames: uint8 [n H W 3] rgb8; true, predicted: bool [n H W], `true` None when the dataset has no masks
    """

    key: str
    sentence: str
    note: str
    frame_names: Sequence[str]
    frames: Sequence[NDArray[np.uint8]]
    true: NDArray[np.bool_] | None
    predicted: NDArray[np.bool_]


def spread(count: int, at_most: int) -> list[int]:
    """At most `at_most` indices of 0..count-1, evenly spread, the first and the last among them."""
    if count <= at_most:
        return list(range(count))
    return [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)] if at_most > 1 else [0]


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    rows: Sequence[ReportRow],
    examples: Sequence[ReportExample],
    note: str = "",
) -> None:
    """Write the report, whole or not at all.

    facts: the tiles at the top, name -> value as text; rows: the score table, sorted by score here
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    if note:
        body.append(f"<p class=note>{html.escape(note)}</p>")
    tiles = (f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in facts.items())
    body.append(f"<section class=tiles>{''.join(tiles)}</section>")
    if examples:
        body.append(_sheet(examples))
    if rows:
        body.append(_table(rows))
    page = _PAGE.replace("{title}", html.escape(title)).replace("{body}", "\n".join(body))
    write_atomically(path, page)


def _table(rows: Sequence[ReportRow]) -> str:
    lines = [
        "<h2>Scores of each expression, lowest first</h2>",
        "<table><tr><th>J&amp;F<th>J<th>F<th>Video / id<th>Sentence",
    ]
    for row in sorted(rows, key=lambda row: (row.jf, row.key)):
        bar = f'<td class=bar style="--part:{min(100.0, max(0.0, row.jf)):.1f}%">{row.jf:.1f}'
        lines.append(
            f"<tr>{bar}<td>{row.j:.1f}<td>{row.f:.1f}<td>{html.escape(row.key)}<td>{html.escape(row.sentence)}"
        )
    return "\n".join([*lines, "</table>"])


def _sheet(examples: Sequence[ReportExample]) -> str:
    blocks = ["<h2>Contact sheet</h2>"]
    for example in examples:
        count = len(example.frames)
        cells = [_row("frame", example.frames)]
        for label, masks, tone in (
            ("true", example.true, TRUE_COLOUR),
            ("predicted", example.predicted, PREDICTED_COLOUR),
        ):
            if masks is not None:
                cells.append(_row(label, [_lit(example.frames[i], masks[i], tone) for i in range(count)]))
        names = "".join(f"<span class=name>{html.escape(name)}</span>" for name in example.frame_names)
        blocks.append(
            f"<figure><figcaption>“{html.escape(example.sentence)}” "
            f"<small>{html.escape(example.key)} · {html.escape(example.note)}</small></figcaption>"
            f'<div class=grid style="--columns:{count}">{"".join(cells)}<i></i>{names}</div></figure>'
        )
    return "\n".join(blocks)


def _row(label: str, pictures: Sequence[NDArray[np.uint8]]) -> str:
    return f"<i>{label}</i>" + "".join(f'<img alt="{label}" src="{_embedded(p)}">' for p in pictures)


def _lit(frame: NDArray[np.uint8], mask: NDArray[np.bool_], tone: Rgb) -> NDArray[np.uint8]:
    """The frame dimmed, with its own light and a coloured veil inside the mask."""
    size = _cell_size(frame)
    dimmed = np.where(mask[..., None], frame, (frame * _DIM).astype(np.uint8))
    return paint(dimmed, [(mask, tone)], size=size)


def _cell_size(frame: NDArray[np.uint8]) -> tuple[int, int]:
    return max(1, round(frame.shape[0] * _CELL_PX / frame.shape[1])), _CELL_PX


def _embedded(picture: NDArray[np.uint8]) -> str:
    """A picture as a data address: JPEG, at the width of a cell."""
    high, wide = _cell_size(picture)
    image = Image.fromarray(picture)
    if image.size != (wide, high):
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
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
.grid { display: grid; gap: 3px; grid-template-columns: 5rem repeat(var(--columns), minmax(0, 160px)) }
.grid i { font-style: normal; font-size: .8rem; opacity: .7; align-self: center }
.grid img { width: 100%; display: block; border-radius: 3px }
.name { font-size: .75rem; opacity: .6; text-align: center; overflow: hidden; text-overflow: ellipsis }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
.bar { background: linear-gradient(90deg, var(--bar) var(--part), transparent var(--part)); min-width: 5rem }
</style></head>
<body>
{body}
</body></html>
"""
