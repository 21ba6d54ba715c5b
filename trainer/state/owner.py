"""The process working in a folder on this machine, and how it ended; for `flowmask status` and `flowmask stop`.

    FOLDER/.owner.json   the process (host, boot, pid, start time), its launcher; number of the start
    FOLDER/.ended.json   how that start ended, by its launcher

Only for display: no training depends on these files, so a failed write is no error.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from flowmask.models.files import write_atomically
from flowmask.models.process import Owner, process_here
from flowmask.models.stored.typed import read_as

T = TypeVar("T")
OWNER, ENDED = ".owner.json", ".ended.json"


@dataclass(frozen=True)
class Start:
    """One start of a job in a folder.

    number: from 1; restarts: starts up to this one whose predecessor had not ended well
    """

    owner: Owner
    launcher: Owner
    number: int
    restarts: int = 0


@dataclass(frozen=True)
class End:
    """How a start ended: the launcher's exit code and a line about it."""

    number: int
    code: int
    message: str = ""


def note_start(folder: Path) -> None:
    """Record that this process works in `folder`; called by the holder of its lock."""
    before, end = read_start(folder), read_end(folder)
    number, restarts = (before.number + 1, before.restarts) if before else (1, 0)
    if before is not None and (end is None or end.code):
        restarts += 1
    launcher = process_here(int(os.environ.get("FLOWMASK_PARENT", os.getpid())))
    _write(folder / OWNER, Start(process_here(os.getpid()), launcher, number, restarts))


def note_end(folder: Path, *, code: int, message: str = "") -> None:
    """Record how the job of this launcher ended, if one of its processes worked in `folder`."""
    start = read_start(folder)
    if start is not None and start.launcher == process_here(os.getpid()):
        _write(folder / ENDED, End(start.number, code, message))


def read_start(folder: Path) -> Start | None:
    """The last start in a folder; None if unknown."""
    return _read(folder / OWNER, Start)


def read_end(folder: Path) -> End | None:
    """How the last start ended; None while it runs, or if it was killed."""
    start, end = read_start(folder), _read(folder / ENDED, End)
    return end if start is not None and end is not None and end.number == start.number else None


def _write(path: Path, said: Start | End) -> None:
    with suppress(OSError):
        write_atomically(path, TypeAdapter(type(said)).dump_json(said))


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return read_as(path, kind)
    except (OSError, ValueError):
        return None
