"""A report of an evaluation as one HTML file: scores and a contact sheet of frames, true and predicted masks.

Self-contained: images are embedded, no script and no address outside the file, so it can be mailed or kept
with the run. Knows nothing of datasets or models; the caller hands it rows and pictures. Text is escaped.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.show import page
from flowmask.data_pipeline.show.paint import PREDICTED_COLOUR, TRUE_COLOUR, lit
from flowmask.models.files import write_atomically
from flowmask.trainer.score.metrics.base import Metric
from flowmask.trainer.score.protocols import number_title


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
    metrics: Mapping[str, Metric],
    rows: Sequence[ReportRow],
    examples: Sequence[ReportExample],
    note: str = "",
    protocol: Mapping[str, Any] | None = None,
) -> None:
    """Write the report, whole or not at all.

    facts: the tiles at the top, name -> value as text; metrics: the columns of the score table by name; rows are
    sorted by the first one, a percentage; protocol: as scores.json has it
    """
    body = [page.note(note)] if note else []
    body.append(page.tiles(facts))
    if protocol is not None:
        body += _protocol(protocol)
    if examples:
        body += [page.heading("Contact sheet"), *map(_sheet, examples)]
    if rows:
        body.append(_table(metrics, rows))
    write_atomically(path, page.document(title, body))


def _table(metrics: Mapping[str, Metric], rows: Sequence[ReportRow]) -> str:
    main, *others = metrics
    titles = "".join(f"<th>{html.escape(metric.title)}" for metric in metrics.values())
    lines = ["<h2>Scores of each expression, lowest first</h2>", f"<table><tr>{titles}<th>Video / id<th>Sentence"]
    for row in sorted(rows, key=lambda row: (row.scores[main], row.key)):
        part, value = min(100.0, max(0.0, row.scores[main])), metrics[main].say(row.scores[main])
        cells = "".join(f"<td>{metrics[name].say(row.scores[name])}" for name in others)
        named = f"<td>{html.escape(row.key)}<td>{html.escape(row.sentence)}"
        lines.append(f'<tr><td class=bar style="--part:{part:.1f}%">{value}{cells}{named}')
    return "\n".join([*lines, "</table>"])


def _protocol(scores: Mapping[str, Any]) -> list[str]:
    """The tables of a benchmark's protocol, one for each convention, that of the default first."""
    parts = [page.heading(f"Protocol {scores['name']}, in percent")]
    for convention, table in scores["tables"].items():
        head = "".join(f"<th>{html.escape(over)}" for over in table)
        default = " (the default)" if convention == scores["convention"] and len(scores["tables"]) > 1 else ""
        lines = [page.paragraph(f"Convention {convention}{default}"), f"<table><tr><th>{head}"]
        for name in next(iter(table.values())):
            cells = "".join(f"<td>{'' if row[name] is None else f'{row[name]:.2f}'}" for row in table.values())
            lines.append(f"<tr><th>{html.escape(number_title(name))}{cells}")
        parts.append("\n".join([*lines, "</table>"]))
    return parts


def _sheet(example: ReportExample) -> str:
    rows = {"frame": example.frames}
    for label, masks, tone in (("true", example.true, TRUE_COLOUR), ("predicted", example.predicted, PREDICTED_COLOUR)):
        if masks is not None:
            rows[label] = [lit(frame, mask, tone) for frame, mask in zip(example.frames, masks, strict=True)]
    detail = f"{example.key} · {example.note}"
    return page.sheet(example.sentence, detail=detail, rows=rows, columns=example.frame_names)
