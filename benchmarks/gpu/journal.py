"""The rows of one measurement: each is on the disk before the next begins, so a crash loses no finished row.

rows.jsonl is the record; results.json and tables.md are written again from it after every row.
"""

import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
MATRIX = "matrix bf16"  # the row with the rate for comparisons
_REASON = 200  # characters of a failure that are kept


class Journal:
    """The results so far; several processes can write it one after another."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / "rows.jsonl"

    def entries(self) -> Iterator[Entry]:
        """Every whole line; the unfinished line of a killed writer is skipped."""
        text = self.path.read_text() if self.path.exists() else ""
        return (json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))

    def rows(self) -> list[Entry]:
        """Rows with figures, failed rows, and rows without time."""
        return [entry for entry in self.entries() if "kind" in entry and "began" not in entry]

    def open_row(self) -> Entry | None:
        """The row in measurement, or the last row of a process that died."""
        last = deque(self.entries(), maxlen=1)
        return last[0] if last and "began" in last[0] else None

    def plan(self, names: list[tuple[str, str]]) -> None:
        """Record all possible rows as (kind, name); those that are missing at the end had no time."""
        self._append({"planned": names})

    def close(self) -> None:
        """Add the rows that had no time."""
        planned = [one for entry in self.entries() for one in entry.get("planned", ())]
        there = {row["row"] for row in self.rows()}
        for kind, name in dict.fromkeys(map(tuple, planned)):
            if name not in there:
                self.add(name, kind=kind, not_started="no time was left")

    def begin(self, name: str, *, kind: str, at_s: float, limit_s: float) -> None:
        """Record the start of `name`; at_s: monotonic seconds, limit_s: its largest allowed time."""
        self._append({"began": at_s, "row": name, "kind": kind, "limit_s": limit_s})

    def add(self, name: str, *, kind: str, **found: Any) -> None:
        """Add a row: figures by name, or `failed` or `not_started` with the reason."""
        for key in ("failed", "not_started"):
            if key in found:
                found[key] = " ".join(str(found[key]).split())[:_REASON]
        self._append({"row": name, "kind": kind, **found})
        rows = self.rows()
        self._replace("results.json", json.dumps(rows, indent=1) + "\n")
        self._replace("tables.md", tables(rows))

    def _append(self, entry: Entry) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, name: str, text: str) -> None:
        beside = self.out / f".{name}"
        beside.write_text(text)
        beside.replace(self.out / name)


def tables(rows: list[Entry]) -> str:
    """Markdown: a table for each kind of row; its columns are the figures of these rows."""
    parts = []
    for kind in dict.fromkeys(row["kind"] for row in rows if "not_started" not in row):
        some = [row for row in rows if row["kind"] == kind and "not_started" not in row]
        columns = list(dict.fromkeys(key for row in some for key in row if key not in ("row", "kind", "failed")))
        failed = any("failed" in row for row in some)
        head = [kind, *(column.replace("_", " ") for column in columns), *["failed"] * failed]
        lines = [_line(head), "|---" * len(head) + "|"]
        for row in some:
            cells = [row["row"].removeprefix(kind).strip(), *(_cell(row.get(column)) for column in columns)]
            lines.append(_line([*cells, *[row.get("failed", "")] * failed]))
        parts.append("\n".join(lines))
    if late := [row["row"] for row in rows if "not_started" in row]:
        parts.append(f"No time was left for {len(late)} rows: {'; '.join(late)}")
    return "\n\n".join(parts) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return "; ".join(map(_cell, value))
    if isinstance(value, dict):
        return "; ".join(f"{key} {_cell(one)}" for key, one in value.items())
    return "" if value is None else str(value)
