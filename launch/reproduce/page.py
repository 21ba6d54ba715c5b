"""The output of a study: one HTML page, and the same table in Markdown and on a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from flowmask.data_pipeline.show import page
from flowmask.data_pipeline.show.page import Cell
from flowmask.data_pipeline.show.page_file import PageFile
from flowmask.data_pipeline.show.paint import PREDICTED_COLOUR, TRUE_COLOUR, lit
from flowmask.launch.progress import duration
from flowmask.launch.reproduce import charts
from flowmask.launch.reproduce.figures import RowFigures, Value
from flowmask.models.errors import UserError
from flowmask.trainer.score.compare.evaluation import Evaluated, Found, Pair, dataset_of

_EXAMPLES, _FRAMES = 3, 5
SCORES = ("Row", "Published", "Ours", "95 %", "Seeds", "Against", "Published gain", "Gain", "95 % of it")
COSTS = ("Row", "Steps", "Process time", "FLOPs", "Examples/s")
HOW_SURE = (
    "95 % intervals: seeds and videos are both drawn 1,000 times with replacement. A difference is paired by seed, "
    "video and sentence. With one seed only the videos are drawn. * marks intervals without 0."
)
_Rows = Sequence[Sequence[str]]


def page_file(out: Path) -> PageFile:
    """The page of a study; an earlier one is replaced."""
    return PageFile(out, title="Study:", kind="a study")


def write_page(file: PageFile, *, title: str, command: str, figures: Sequence[RowFigures]) -> None:
    """Write the page: table, scores next to the published ones, losses, and three sentences with every row's masks."""
    done, wanted = (sum(numbers) for numbers in zip(*((len(one.scores), one.seeds) for one in figures)))
    body = [page.pairs({"command": command, "done": f"{done} of {wanted} evaluations"})]
    if done < wanted:
        left = wanted - done
        missing = f"{left} evaluation{'s are' if left > 1 else ' is'} missing"
        body.append(page.note(f"{missing}; the same command continues."))
    body += [page.paragraph(HOW_SURE), page.table(SCORES, _sortable(scores(figures)))]
    body += [page.heading("J&F: rings are published scores, dots are ours, one for each seed"), charts.scores(figures)]
    if curves := charts.losses(figures):
        body += [
            page.heading("Cost of one training of each row, mean over its seeds"),
            page.table(COSTS, _sortable(costs(figures))),
        ]
        body += [page.subheading("Loss, one line for each seed; not comparable between objectives")]
        body += [page.side_by_side(curves)]
    sheets = list(_sheets(figures))
    if sheets:
        legend = page.legend({"true mask": TRUE_COLOUR, "predicted mask": PREDICTED_COLOUR, "outside": None})
        body += [page.heading("The same sentences in every row, at the first seed"), legend, *sheets]
    file.write(title, body)


def scores(figures: Sequence[RowFigures]) -> list[list[str]]:
    """The rows of the table of scores as text, in the order of SCORES."""
    titles = {one.row.name: one.row.title for one in figures}
    return [
        [
            one.row.title,
            "" if one.row.published is None else f"{one.row.published:.1f}",
            "" if one.mean is None else f"{one.mean.mean:.1f}",
            _interval(one.mean),
            f"{len(one.scores)} of {one.seeds}" if len(one.scores) < one.seeds else str(one.seeds),
            titles[one.row.against] if one.row.against else "",
            "" if one.published_against is None else f"{one.published_against:+.1f}",
            "" if one.against is None else f"{one.against.mean:+.1f}{'*' * one.against.is_sure}",
            _interval(one.against, signed=True),
        ]
        for one in figures
    ]


def costs(figures: Sequence[RowFigures]) -> list[list[str]]:
    """The cost of one training of each row, in the order of COSTS."""
    return [
        [
            one.row.title,
            f"{cost.steps:,}",
            duration(3600 * cost.process_hours),
            "" if cost.pflop is None else _flops(1e15 * cost.pflop),
            f"{cost.examples_per_s:.3g}",
        ]
        for one in figures
        if (cost := one.cost) is not None
    ]


def markdown(figures: Sequence[RowFigures]) -> str:
    """Both tables in Markdown."""
    tables = [(SCORES, scores(figures)), (COSTS, costs(figures))]
    return "\n".join(_markdown(titles, rows) for titles, rows in tables)


def _markdown(titles: Sequence[str], rows: _Rows) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    escaped = ([cell.replace("|", r"\|").replace("*", r"\*") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def _sortable(rows: _Rows) -> list[list[Cell]]:
    """Cells of a page: the first names its row; a cell that begins with a number is sorted by it and not wrapped."""
    return [[Cell(row[0], head=True), *map(_cell, row[1:])] for row in rows]


def _cell(text: str) -> Cell:
    value = _value(text)
    return Cell(text if value is None else text.replace(" ", "\N{NO-BREAK SPACE}"), value)


def _value(text: str) -> float | None:
    try:
        return float(text.split(" ")[0].rstrip("*").replace(",", ""))
    except ValueError:
        return None


def on_terminal(figures: Sequence[RowFigures]) -> Table:
    """The scores alone, narrow enough for 80 columns."""
    kept = [place for place, title in enumerate(SCORES) if title not in ("Seeds", "Against", "Published gain")]
    table = Table(*(SCORES[place] for place in kept), box=None, padding=(0, 1, 0, 0))
    for row in scores(figures):
        table.add_row(*(row[place] for place in kept))
    return table


def _interval(value: Value | None, *, signed: bool = False) -> str:
    if value is None or value.interval is None:
        return ""
    low, high = value.interval
    return f"{low:+.1f} to {high:+.1f}" if signed else f"{low:.1f} to {high:.1f}"


def _flops(value: float) -> str:
    """FLOPs in the largest unit that gives at least 1."""
    sizes = {"E": 1e18, "P": 1e15, "T": 1e12}
    unit = next((unit for unit, size in sizes.items() if value >= size), "G")
    return f"{value / sizes.get(unit, 1e9):,.3g} {unit}FLOP"


def _sheets(figures: Sequence[RowFigures]) -> Iterator[str]:
    """A few expressions of one dataset: the true mask, and each row's mask below it."""
    first = {one.row.title: one.scores[min(one.scores)] for one in figures if one.scores}
    if not first:
        return
    found, _ = dataset_of(list(first.values()))
    shared = [pair for pair in found if all(pair in one.scores for one in first.values())]
    named = [pair for pair in shared if found[pair][1].anno_ids]
    for place in page.spread(len(named), _EXAMPLES):
        if sheet := _sheet(named[place], found, first):
            yield sheet


def _sheet(pair: Pair, found: Found, evaluations: Mapping[str, Evaluated]) -> str:
    video, expression = found[pair]
    try:
        known = sorted(video.annotated(expression.anno_ids) or range(len(video.frame_names)))
        ids = [known[place] for place in page.spread(len(known), _FRAMES)]
        names, frames = [video.frame_names[i] for i in ids], video.frames(ids)
        truth = video.mask(expression.anno_ids, ids)
        rows: dict[str, list[NDArray[np.uint8]]] = {"frame": list(frames)}
        rows["true mask"] = [lit(frame, mask, TRUE_COLOUR) for frame, mask in zip(frames, truth)]
        for title, one in evaluations.items():
            masks = one.masks(pair, names, size=video.size)
            if masks is not None:
                rows[title] = [lit(frame, mask, PREDICTED_COLOUR) for frame, mask in zip(frames, masks)]
    except (UserError, OSError):
        return ""
    return page.sheet(expression.text, detail="/".join(pair), rows=rows, columns=names)
