"""RUN/timeline/rank-00000.jsonl: how each rank spends its steps, one line for every few steps, of bounded size.

A full file becomes rank-00000.old.jsonl and replaces the one before. Steps trained again after a kill occur
twice: the later line counts. The folder may belong to another user.
"""

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flowmask.models.errors import CheckpointError
from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import parse_json
from flowmask.trainer.phases import Spent, finite
from flowmask.trainer.track.meters import memory

TIMELINE = "timeline"
FILE_BYTES = 1 << 20
_NAME = re.compile(r"rank-(\d{5,6})(\.old)?\.jsonl")
_Number = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


@dataclass(frozen=True)
class TimeSample:
    """A line: one rank's last `steps` steps up to `step` took `total_s` seconds, with the seconds of each phase.

    time: of writing, in seconds since 1970; memory: GiB by the names of `meters.memory`
    """

    rank: Annotated[int, Field(ge=0, lt=1 << 20)]
    world_size: Annotated[int, Field(ge=1, le=1 << 20)]
    host: Annotated[str, Field(max_length=255)]
    step: Annotated[int, Field(ge=0, lt=1 << 53)]
    steps: Annotated[int, Field(ge=1, lt=1 << 53)]
    time: _Number
    total_s: _Number
    phases: dict[str, _Number]
    memory: dict[str, _Number]

    def a_step(self, phase: str) -> float:
        """Average seconds of a phase in one step."""
        return self.phases.get(phase, 0.0) / self.steps


class TimelineFile:
    """The file of this rank; a line that the disk refuses is lost without an error."""

    def __init__(self, folder: Path, *, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._path = folder / TIMELINE / f"rank-{rank:05d}.jsonl"
        self._file: IO[bytes] | None = None

    def add(self, step: int, spent: Spent) -> None:
        """Append the sample that ends with `step`, with this process's memory now; nothing if it has no steps."""
        if not spent.steps:
            return
        row = {
            "rank": self._rank,
            "world_size": self._world_size,
            "host": os.uname().nodename,
            "step": step,
            "steps": spent.steps,
            "time": time.time(),
            "total_s": finite(spent.total_s),
            "phases": {phase: round(finite(seconds), 6) for phase, seconds in spent.phases.items()},
            "memory": memory(),
        }
        try:
            self._opened().write(json.dumps(row).encode() + b"\n")
        except OSError:
            self.close()

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab", buffering=0, opener=_itself)  # noqa: SIM115 - follows no link
        if self._file.tell() > FILE_BYTES:
            self.close()
            self._path.rename(self._path.with_suffix(".old.jsonl"))
            return self._opened()
        return self._file

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_timeline(folder: Path) -> list[TimeSample]:
    """The samples of all ranks of a run; CheckpointError if there are none. Invalid lines are skipped."""
    found: list[TimeSample] = []
    for path in sorted((folder / TIMELINE).glob("rank-*.jsonl")):
        if _NAME.fullmatch(path.name):
            found += _samples(path)
    if not found:
        raise CheckpointError(
            f"{folder} has no time line: it is no run, was trained by an older version, or has not come to the step of "
            "its first line of log.txt yet (train.log_every_steps)"
        )
    return found


def aligned(samples: Sequence[TimeSample]) -> list[list[TimeSample]]:
    """The samples of steps that every rank has: for each such step, in order, one sample per rank, by rank.

    If a rank has several samples of a step, the latest one and its number of ranks count.
    """
    by_step: dict[int, dict[int, TimeSample]] = defaultdict(dict)
    for sample in sorted(samples, key=lambda one: one.time):
        by_step[sample.step][sample.rank] = sample
    found = []
    for _, ranks in sorted(by_step.items()):
        world = max(ranks.values(), key=lambda one: one.time).world_size
        if all(rank in ranks and ranks[rank].world_size == world for rank in range(world)):
            found.append([ranks[rank] for rank in range(world)])
    return found


def _samples(path: Path) -> list[TimeSample]:
    try:
        lines = read_regular(path, limit=2 * FILE_BYTES).splitlines()
    except OSError:
        return []
    return [sample for line in lines if (sample := _sample(line)) is not None]


_ROW: TypeAdapter[TimeSample] = TypeAdapter(TimeSample)


def _sample(line: bytes) -> TimeSample | None:
    try:
        row: Mapping[str, Any] = parse_json(line)
        return _ROW.validate_python(row)
    except (ValueError, ValidationError):
        return None


def _itself(path: str, flags: int) -> int:
    """Open a file of the folder; do not follow a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)
