"""A report of an evaluation as one HTML file: scores, tables of parts of the dataset, frames with their masks.

Self-contained: images are embedded, no address outside the file, so it can be mailed or stored with the run.
Independent of datasets and models: the caller passes rows and pictures. Text is escaped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.show import page
from flowmask.data_pipeline.show.page import Cell
from flowmask.data_pipeline.show.paint import PREDICTED_COLOUR, TRUE_COLOUR, lit
from flowmask.models.files import write_atomically
from flowmask.trainer.score.intervals import Interval
from flowmask.trainer.score.metrics.base import Metric
from flowmask.trainer.score.protocols import number_title
from flowmask.trainer.score.slices import TITLES, Slices

_INTERVALS = "In brackets: 95 % intervals, from drawing the videos 1,000 times with replacement."


@dataclass(frozen=True)
class ReportRow:
    """One line of the score table."""

    key: str
    sentence: str
    scores: Mapping[str, float]


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


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    made_from: Mapping[str, str],
    metrics: Mapping[str, Metric],
    rows: Sequence[ReportRow],
    slices: Slices,
    examples: Mapping[str, Sequence[ReportExample]],
    note: str = "",
    protocol: Mapping[str, Any] | None = None,
) -> None:
    """Write the report, atomically.

    facts, made_from: the tiles at the top and the table below, name -> value as text; metrics: the columns of the
    score tables by name; rows are sorted by the first one, a percentage; examples: by kind of choice; protocol:
    as in scores.json
    """
    body = [page.note(note)] if note else []
    body += [page.tiles(facts), *([page.paragraph(_INTERVALS)] if rows else []), page.pairs(made_from)]
    if protocol is not None:
        body += _protocol(protocol)
    if slices:
        parts = [_slice(TITLES[name], buckets, metrics) for name, buckets in slices.items()]
        body += [page.heading("Scores of parts of the dataset"), page.side_by_side(parts)]
    if examples:
        has_truth = any(one.true is not None for some in examples.values() for one in some)
        body += [page.heading("Examples"), _legend(has_truth=has_truth)]
    for how, some in examples.items():
        body += [page.subheading(how), *map(_sheet, some)]
    if rows:
        body += [page.heading("Scores of each expression, lowest first"), _table(metrics, rows)]
    write_atomically(path, page.document(title, body))


def with_interval(metric: Metric, value: float, interval: Interval | None) -> str:
    """A value as text for a table, with its interval if there is one."""
    said = metric.say(value)
    return f"{said} ({metric.say(interval[0])}–{metric.say(interval[1])})" if interval else said


def _legend(*, has_truth: bool) -> str:
    truth = {"true mask": TRUE_COLOUR} if has_truth else {}
    return page.legend({**truth, "predicted mask": PREDICTED_COLOUR, "outside of the mask": None})


def _slice(title: str, buckets: Mapping[str, Mapping[str, float]], metrics: Mapping[str, Metric]) -> str:
    rows = [
        [
            Cell(bucket, value=place, head=True),
            *_cells(metrics, scores),
            Cell(f"{scores['expressions']:,.0f}", scores["expressions"]),
        ]
        for place, (bucket, scores) in enumerate(buckets.items())
    ]
    return page.table([title, *(metric.title for metric in metrics.values()), "Expressions"], rows)


def _table(metrics: Mapping[str, Metric], rows: Sequence[ReportRow]) -> str:
    main = next(iter(metrics))
    lines = [
        [*_cells(metrics, row.scores), Cell(row.key), Cell(row.sentence)]
        for row in sorted(rows, key=lambda row: (row.scores[main], row.key))
    ]
    return page.table([*(metric.title for metric in metrics.values()), "Video / id", "Sentence"], lines)


def _cells(metrics: Mapping[str, Metric], scores: Mapping[str, float]) -> list[Cell]:
    """A cell of each metric, the first with a bar."""
    main = next(iter(metrics))
    return [
        Cell(metric.say(scores[name]), scores[name], scores[name] if name == main else None)
        for name, metric in metrics.items()
    ]


def _protocol(scores: Mapping[str, Any]) -> list[str]:
    """The tables of a benchmark's protocol, one for each convention, that of the default first."""
    parts = [page.heading(f"Protocol {scores['name']}, in percent")]
    for convention, table in scores["tables"].items():
        default = " (the default)" if convention == scores["convention"] and len(scores["tables"]) > 1 else ""
        rows = [
            [Cell(number_title(name), head=True), *(_percent(row[name]) for row in table.values())]
            for name in next(iter(table.values()))
        ]
        parts += [page.paragraph(f"Convention {convention}{default}"), page.table(["", *table], rows)]
    return parts


def _percent(value: float | None) -> Cell:
    return Cell("") if value is None else Cell(f"{value:.2f}", value)


def _sheet(example: ReportExample) -> str:
    rows = {"frame": example.frames}
    for label, masks, tone in (("true", example.true, TRUE_COLOUR), ("predicted", example.predicted, PREDICTED_COLOUR)):
        if masks is not None:
            rows[label] = [lit(frame, mask, tone) for frame, mask in zip(example.frames, masks, strict=True)]
    detail = f"{example.key} · {example.note}"
    return page.sheet(example.sentence, detail=detail, rows=rows, columns=example.frame_names)
