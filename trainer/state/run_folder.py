"""The folder of one training run: one writer, a resolved config, one metrics row per step, a text log.

    config.yaml   metrics.jsonl   evaluations.jsonl   log.txt   tracking.json
    checkpoints/step_00000040/   checkpoints/latest   checkpoints/best

Only rank 0 writes here (except checkpoints). Refuses a folder with other contents, and a second writer.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flowmask.models.errors import CheckpointError
from flowmask.models.files import read_object, sync_open, write_atomically
from flowmask.models.folders.output_folder import LOCK, PATIENCE_S, Kind, OutputFolder
from flowmask.models.stored.regular import open_regular
from flowmask.models.stored.sealed import parse_json
from flowmask.models.stored.typed import read_yaml

CONFIG, METRICS, LOG = "config.yaml", "metrics.jsonl", "log.txt"
EVALUATIONS, OVERLAYS = "evaluations.jsonl", "overlays"
CHECKPOINTS, TRACKING = "checkpoints", "tracking.json"
_TAIL_BYTES = 1 << 16


class RunFolder:
    """A run folder that only this process may write; `close` (or the end of the process) releases it."""

    def __init__(self, path: Path, *, patience_s: float = PATIENCE_S) -> None:
        """Create and lock `path`; raises CheckpointError if that fails or `path` has other contents."""
        self.path = path
        self._lock = OutputFolder(path, RUN).take(patience_s=patience_s)
        self._metrics: Any = None
        self._evaluations: Any = None

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Save, in JSON types, the config that repeats this run."""
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_atomically(self.path / CONFIG, text)

    def open_metrics(self, *, after_step: int, evaluated_step: int = 0) -> None:
        """Continue the files after the rows of `after_step` and of the last saved evaluation.

        Later rows and an incomplete last line are removed.
        """
        self._metrics = _continue_rows(self.path / METRICS, after_step)
        self._evaluations = _continue_rows(self.path / EVALUATIONS, evaluated_step)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append one step's row."""
        _append(self._metrics, row)

    def rows(self, first: int, last: int) -> list[dict[str, Any]]:
        """The rows of some steps, from any start."""
        found = last_rows(self.path / METRICS, last - first + 1) if last >= first else []
        return [row for row in found if first <= row["step"] <= last]

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append one validation to evaluations.jsonl."""
        _append(self._evaluations, row)

    def sync(self) -> None:
        """Flush the rows to disk; called before a checkpoint that depends on them is published."""
        sync_open(self._metrics)
        sync_open(self._evaluations)

    def close(self) -> None:
        """Release the lock."""
        for rows in (self._metrics, self._evaluations):
            if rows is not None:
                rows.close()
        os.close(self._lock)


def last_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` whole rows of a metrics file, in order; fewer if the file has fewer or is damaged."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            taken, content = 0, b""
            while taken < size and content.count(b"\n") <= count:
                taken = min(size, max(_TAIL_BYTES, 2 * taken))
                file.seek(size - taken)
                content = file.read(taken)
    except OSError:
        return []
    rows = map(row_of, content.split(b"\n")[taken < size : -1][-count:])
    return [row for row in rows if row is not None]


def row_of(line: bytes) -> dict[str, Any] | None:
    """The row of a whole line of a metrics file, with an integer `step`; None if the line is damaged."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def plain(value: Any) -> Any:
    """The value in types of YAML and JSON: paths become strings, tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _append(file: Any, row: Mapping[str, Any]) -> None:
    """Write one row in one write, so that a kill can cut only the last line; NaN and infinities are written as null."""
    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    file.write(json.dumps(known, allow_nan=False).encode() + b"\n")


def _continue_rows(path: Path, step: int) -> Any:
    """The file opened for appending, cut to its rows up to `step`."""
    try:
        kept = b"".join(_rows_up_to(path, step)) if path.exists() else b""
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}); move it away") from error
    if not path.exists() or kept != path.read_bytes():
        write_atomically(path, kept)
    return path.open("ab", buffering=0)


def _rows_up_to(path: Path, step: int) -> Iterator[bytes]:
    with os.fdopen(open_regular(path), "rb") as file:
        for line in file:
            row = row_of(line) if line.endswith(b"\n") else None
            if row is None:
                continue  # a line that a kill or the disk has damaged
            if row["step"] > step:
                return
            yield line


def _older_run(path: Path) -> tuple[()] | None:
    """Whether it is a run of an earlier version: its files exist and parse. Other files are ignored."""
    there = {name: check for name, check in _PARSES.items() if (path / name).exists()}
    others = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} - there.keys() - {OVERLAYS}
    strange = {name for name in others if not name.startswith(("launch", "slurm"))}
    known = all(check(path / name) for name, check in there.items())
    return () if known and (there.keys() & {METRICS, CHECKPOINTS} or not strange) else None


def _is_run_config(path: Path) -> bool:
    try:
        content = read_yaml(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"train", "model", "data"} <= content.keys()


def _are_rows(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline()
    return not first or (first.endswith(b"\n") and row_of(first) is not None)


def _are_checkpoints(path: Path) -> bool:
    """Whether `checkpoints/` has only complete steps, links to them, and leftovers of a kill."""
    return path.is_dir() and all(_is_step_or_link(entry) for entry in path.iterdir())


def _is_step_or_link(path: Path) -> bool:
    if path.name in ("latest", "best"):
        return path.is_symlink()
    whole = bool(re.fullmatch(r"step_\d{8,}", path.name)) and bool(read_object(path / "state.json"))
    return whole or bool(re.fullmatch(r"\.(writing|trash|link)_.*", path.name))


_PARSES: dict[str, Callable[[Path], bool]] = {
    CONFIG: _is_run_config,
    METRICS: _are_rows,
    EVALUATIONS: _are_rows,
    CHECKPOINTS: _are_checkpoints,
    TRACKING: lambda path: bool(read_object(path)),
    LOG: lambda path: not (text := path.read_bytes()[:30]) or bool(re.match(rb"\d{4}-\d\d-\d\d \d\d:", text)),
    LOCK: lambda path: path.read_bytes().startswith(b"process "),
}
RUN = Kind("a run", older=_older_run, dots=(".owner.json", ".ended.json", ".tracking.lock"), error=CheckpointError)
