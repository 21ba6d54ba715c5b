"""What a check found: the one form in which `doctor`, `submit` and `curriculum` say how something stands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["pass", "warn", "fail", "unknown"]


@dataclass(frozen=True)
class Finding:
    """`what` was asked, how it stands, one line about it, and the fix where that line does not hold it.

    path: the input that is missing, so that whoever knows which job will make it can tell.
    """

    what: str
    state: State
    said: str
    fix: str = ""
    path: Path | None = None


def judged(what: str, good: object, said: str, fix: str = "", *, otherwise: State = "fail") -> Finding:
    """`pass` if something holds."""
    return Finding(what, "pass" if good else otherwise, said, fix)
