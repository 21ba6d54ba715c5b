"""Who works in a folder on this machine, and how that ended: read by `flowmask status` and `flowmask stop`.

    FOLDER/.owner.json   the process that works there (host, boot, pid, start time), its launcher; which start it is
    FOLDER/.ended.json   how the launcher says that start ended

Only for people who look: no training depends on these files, so a disk that refuses them is no error.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flowmask.models.files import write_atomically
from flowmask.models.process import Owner, process_here

OWNER, ENDED = ".owner.json", ".ended.json"


@dataclass(frozen=True)
class Start:
    """One start of a job in a folder; `number` counts from 1."""

    owner: Owner
    launcher: Owner
    number: int


@dataclass(frozen=True)
class End:
    """How a start ended: the launcher's exit code and a line about it."""

    number: int
    code: int
    message: str = ""


def note_start(folder: Path) -> None:
    """Say that this process works in `folder` now; called by whoever holds its lock."""
    before = read_start(folder)
    found = {
        "owner": process_here(os.getpid()).model_dump(),
        "launcher": process_here(int(os.environ.get("FLOWMASK_PARENT", os.getpid()))).model_dump(),
        "number": before.number + 1 if before else 1,
    }
    with suppress(OSError):
        write_atomically(folder / OWNER, json.dumps(found))


def note_end(folder: Path, *, code: int, message: str = "") -> None:
    """Say how the job of this launcher ended, if one of its processes worked in `folder`."""
    start = read_start(folder)
    if start is None or start.launcher != process_here(os.getpid()):
        return
    with suppress(OSError):
        write_atomically(folder / ENDED, json.dumps(asdict(End(start.number, code, message))))


def read_start(folder: Path) -> Start | None:
    """The last start in a folder; None if none is known."""
    found = _read(folder / OWNER)
    try:
        return Start(
            Owner.model_validate(found["owner"]), Owner.model_validate(found["launcher"]), int(found["number"])
        )
    except (KeyError, TypeError, ValueError, ValidationError):
        return None


def read_end(folder: Path) -> End | None:
    """How the last start ended; None while it goes on, and when it was killed."""
    start, found = read_start(folder), _read(folder / ENDED)
    try:
        end = End(int(found["number"]), int(found["code"]), str(found["message"]))
    except (KeyError, TypeError, ValueError):
        return None
    return end if start is not None and end.number == start.number else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
