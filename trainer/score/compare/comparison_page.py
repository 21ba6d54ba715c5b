"""`flowmask compare --out`: the differences of evaluations as one HTML page, with the largest changes."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.show import page
from flowmask.data_pipeline.show.page import Cell
from flowmask.data_pipeline.show.page_file import PageFile
from flowmask.data_pipeline.show.paint import PREDICTED_COLOUR, TRUE_COLOUR, lit
from flowmask.models.errors import UserError
from flowmask.trainer.score.compare.differences import PairedScores
from flowmask.trainer.score.compare.evaluation import Found, Pair, dataset_of
from flowmask.trainer.score.metrics import MAIN, metrics
from flowmask.trainer.score.results import NOTHING

_INTERVALS = "Intervals of 95 % are those of the differences when the videos are drawn 1,000 times with replacement."
_ROWS, _SHEETS, _FRAMES = 200, 12, 6
_SIDE = 400  # of the scatter, in its own units; with a margin for the axes
_MARGIN = 44


def page_file(out: Path) -> PageFile:
    """The file of a page; it replaces only an earlier page of this kind."""
    return PageFile(out, title="Compared evaluations", kind="compared evaluations")


def write_page(file: PageFile, comparisons: Sequence[PairedScores]) -> None:
    """Write the page of at least one comparison; all have the same first evaluation."""
    first = comparisons[0].first
    names = {label(0): str(first.path)} | {label(i): str(one.other.path) for i, one in enumerate(comparisons, 1)}
    found, why_not = dataset_of([first, *(one.other for one in comparisons)])
    body = [page.pairs(names), page.paragraph(_INTERVALS)]
    body += [page.note(why_not)] if why_not else []
    for number, comparison in enumerate(comparisons, 1):
        body += _section(comparison, found, other=label(number))
    file.write(" and ".join(names.values()), body)


def label(number: int) -> str:
    """The name of an evaluation on the page: A is the first."""
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def _section(comparison: PairedScores, found: Found, *, other: str) -> list[str]:
    first, title = label(0), metrics()[MAIN].title
    most = sorted(comparison.shared, key=lambda pair: (-abs(comparison.change(pair)), pair))
    changed = [pair for pair in most if comparison.change(pair)]
    sheets = [sheet for pair in changed[:_SHEETS] if (sheet := _sheet(comparison, pair, found, other=other))]
    many = f"{min(len(changed), _ROWS):,} of {len(changed):,} expressions"
    return [
        page.heading(f"{other} against {first}"),
        page.paragraph(f"{comparison.counts(first=first, other=other)}."),
        _differences(comparison, other=other),
        page.subheading(f"{title} of each expression: {first} to the right, {other} upwards"),
        _scatter(comparison, found),
        *([page.subheading(f"Largest changes of {title}"), *_legend(), *sheets] if sheets else []),
        *([page.subheading(f"{many} that changed, the largest change first"),
           _changes(comparison, changed[:_ROWS], found, other=other)] if changed else []),
    ]  # fmt: skip


def _legend() -> list[str]:
    return [page.legend({"true mask": TRUE_COLOUR, "predicted mask": PREDICTED_COLOUR, "outside of the mask": None})]


def _differences(comparison: PairedScores, *, other: str) -> str:
    rows = []
    for name, one in comparison.metrics.items():
        cells = (Cell(f"{value:.2f}", value) for value in (one.first, one.other))
        rows.append(
            [Cell(title_of(name), head=True), *cells, Cell(signed(one.value), one.value), Cell(said(one.interval))]
        )
    return page.table(["Mean over both", label(0), other, f"{other} - {label(0)}", "95 % interval"], rows)


def title_of(name: str) -> str:
    """The title of a comparison's number."""
    return metrics()[name].title if name in metrics() else NOTHING.get(name, name)


def signed(value: float) -> str:
    """A difference with its sign; 0.00 if it is less than half of the last digit."""
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"


def said(interval: Sequence[float] | None) -> str:
    """An interval of a difference, as text."""
    return f"{signed(interval[0])} to {signed(interval[1])}" if interval else "needs two videos"


def _scatter(comparison: PairedScores, found: Found) -> str:
    dots = []
    for pair in comparison.shared:
        one, two = (evaluated.scores[pair][MAIN] for evaluated in (comparison.first, comparison.other))
        tip = html.escape(f"{'/'.join(pair)} {_text(pair, found)}: {one:.1f}, {two:.1f}")
        dots.append(
            f'<circle cx="{_across(one):.1f}" cy="{_SIDE - _across(two):.1f}" r="3"><title>{tip}</title></circle>'
        )
    low, high = _across(0), _across(100)
    ticks = "".join(
        f'<text x="{_across(tick)}" y="{_SIDE - low + 16}" text-anchor="middle">{tick}</text>'
        f'<text x="{low - 6}" y="{_SIDE - _across(tick) + 4}" text-anchor="end">{tick}</text>'
        for tick in (0, 25, 50, 75, 100)
    )
    frame = f'<path d="M{low} {_SIDE - high}V{_SIDE - low}H{high}M{low} {_SIDE - low}L{high} {_SIDE - high}"/>'
    return f'<svg class=scatter viewBox="0 0 {_SIDE} {_SIDE}" role=img>{frame}{ticks}{"".join(dots)}</svg>'


def _across(percent: float) -> float:
    return _MARGIN + min(100.0, max(0.0, percent)) / 100 * (_SIDE - _MARGIN - 12)


def _text(pair: Pair, found: Found) -> str:
    return found[pair][1].text if pair in found else ""


def _changes(comparison: PairedScores, pairs: Sequence[Pair], found: Found, *, other: str) -> str:
    rows = []
    for pair in pairs:
        values = [evaluated.scores[pair][MAIN] for evaluated in (comparison.first, comparison.other)]
        change = comparison.change(pair)
        numbers = [*(Cell(f"{value:.1f}", value) for value in values), Cell(signed(change), change)]
        rows.append([*numbers, Cell("/".join(pair)), Cell(_text(pair, found))])
    return page.table([label(0), other, "Change", "Video / id", "Sentence"], rows)


def _sheet(comparison: PairedScores, pair: Pair, found: Found, *, other: str) -> str:
    """The frames of an expression with all masks; empty if the dataset or the masks are missing."""
    if pair not in found:
        return ""
    video, expression = found[pair]
    try:
        known = sorted(video.annotated(expression.anno_ids) or range(len(video.frame_names)))
        ids = [known[place] for place in page.spread(len(known), _FRAMES)]
        names, frames = [video.frame_names[i] for i in ids], video.frames(ids)
        masks: dict[str, NDArray[np.bool_] | None] = {
            "true": video.mask(expression.anno_ids, ids),
            label(0): comparison.first.masks(pair, names, size=video.size),
            other: comparison.other.masks(pair, names, size=video.size),
        }
    except (UserError, OSError):
        return ""
    rows = {"frame": frames} | _painted(frames, masks)
    one, two = (evaluated.scores[pair][MAIN] for evaluated in (comparison.first, comparison.other))
    detail = f"{'/'.join(pair)} · {label(0)} {one:.1f}, {other} {two:.1f}, change {signed(two - one)}"
    return page.sheet(expression.text, detail=detail, rows=rows, columns=names)


def _painted(
    frames: Sequence[NDArray[np.uint8]], masks: Mapping[str, NDArray[np.bool_] | None]
) -> dict[str, list[NDArray[np.uint8]]]:
    return {
        name: [lit(f, mask, TRUE_COLOUR if name == "true" else PREDICTED_COLOUR) for f, mask in zip(frames, some)]
        for name, some in masks.items()
        if some is not None
    }
