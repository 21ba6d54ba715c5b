"""The result of a check, in the one form that `doctor`, `submit` and `curriculum` share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["pass", "warn", "fail", "unknown"]


@dataclass(frozen=True)
class Finding:
    """what: subject of the check; state; said: one line about it; fix: the fix, if `said` does not contain it.

    path: the missing input, so that a caller can tell which job will make it.
    """

    what: str
    state: State
    said: str
    fix: str = ""
    path: Path | None = None


def judged(what: str, good: object, said: str, fix: str = "", *, otherwise: State = "fail") -> Finding:
    """`pass` if `good` is true, else `otherwise`."""
    return Finding(what, "pass" if good else otherwise, said, fix)
