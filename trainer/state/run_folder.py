"""The folder of one training run: one writer, a resolved config, one metrics row per step, a text log.

    config.yaml   metrics.jsonl   evaluations.jsonl   log.txt   tracking.json
    checkpoints/step_00000040/   checkpoints/latest   checkpoints/best

Only rank 0 writes here (checkpoints aside). A folder that holds something else is refused, as is a second writer.
"""

import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flowmask.models.errors import CheckpointError
from flowmask.models.files import sync_open, write_atomically
from flowmask.models.stored.regular import open_regular
from flowmask.models.stored.sealed import parse_json
from flowmask.models.stored.typed import read_yaml
from flowmask.trainer.state import locks

LOCK_PATIENCE_S = 15.0
CONFIG, METRICS, LOG = "config.yaml", "metrics.jsonl", "log.txt"
EVALUATIONS, OVERLAYS = "evaluations.jsonl", "overlays"
CHECKPOINTS, TRACKING = "checkpoints", "tracking.json"


class RunFolder:
    """A run folder that this process alone may write; `close` (or the process's death) lets it go."""

    def __init__(self, path: Path, *, patience_s: float = LOCK_PATIENCE_S) -> None:
        """Create and lock `path`; CheckpointError if that can't be done or `path` holds something else."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(path)
            self._lock = _lock(path / ".lock", patience_s)
        except OSError as error:
            raise CheckpointError(f"out is {path}; it can't be written ({error.strerror}): choose another") from error
        self._metrics: Any = None
        self._evaluations: Any = None

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Save the config that repeats this run, in JSON's types."""
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_atomically(self.path / CONFIG, text)

    def open_metrics(self, *, after_step: int, evaluated_step: int = 0) -> None:
        """Continue the rows behind those of `after_step` and of the last evaluation that is remembered.

        Later rows and a torn last line go.
        """
        self._metrics = _continue_rows(self.path / METRICS, after_step)
        self._evaluations = _continue_rows(self.path / EVALUATIONS, evaluated_step)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append one step's row."""
        _append(self._metrics, row)

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append one validation to evaluations.jsonl."""
        _append(self._evaluations, row)

    def sync(self) -> None:
        """Put the rows on disk; called before a checkpoint that builds on them is published."""
        sync_open(self._metrics)
        sync_open(self._evaluations)

    def close(self) -> None:
        """Let the lock go."""
        for rows in (self._metrics, self._evaluations):
            if rows is not None:
                rows.close()
        os.close(self._lock)


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
    """The value in YAML's and JSON's own types: paths become strings and tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _append(file: Any, row: Mapping[str, Any]) -> None:
    """One row in one write, so that a kill can tear only the last line; NaN and infinities are written as null."""
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
            number = _step_of(line)
            if number is None or number > step:
                return
            yield line


def _step_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _refuse_foreign(path: Path) -> None:
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    if not names or names & {METRICS, CHECKPOINTS}:
        return
    strange = sorted(
        name
        for name in names - {CONFIG, EVALUATIONS, LOG, OVERLAYS, TRACKING}
        if not name.startswith(("launch", "slurm"))
    )
    if strange or (CONFIG in names and not _is_run_config(path / CONFIG)):
        found = ", ".join(strange[:3] or [CONFIG])
        raise CheckpointError(f"out is {path}, which is not a run but holds {found}; choose an empty folder")


def _is_run_config(path: Path) -> bool:
    try:
        content = read_yaml(path)
    except ValueError:
        return False
    return isinstance(content, dict) and {"train", "model", "data"} <= content.keys()


def _lock(path: Path, patience_s: float) -> int:
    handle = locks.take(path, patience_s=patience_s)
    if handle is None:
        holder = path.read_text(errors="replace").strip() or "an unknown process"
        raise CheckpointError(
            f"{path.parent} is being written by {holder}; stop it or choose another out (waited {patience_s:.0f} s)"
        )
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return handle
