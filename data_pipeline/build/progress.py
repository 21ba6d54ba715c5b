"""How far all workers of a build have come: what is told, and counting it without asking the disk too often."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

Phase = Literal["plan", "cost", "text", "clips", "finalise", "complete"]
_COUNT_EVERY_S = 1.0
_SHARE = 0.02  # of the time, at the most, that counting takes


@dataclass(frozen=True)
class BuildProgress:
    """How far all workers together have come in a phase: units of `text` are sentences, of `clips` clips."""

    phase: Phase
    done: int
    total: int
    note: str = ""  # a line for the person who waits


OnProgress = Callable[[BuildProgress], None]


class ProgressCount:
    """Things that all workers have done in a phase, of `total`; `listed` lists the finished units, of `per_unit` each.

    A listing costs as much as there are units, so there is one in a while, and our own work is added in between.
    """

    def __init__(self, listed: Callable[[], Collection[int]], *, per_unit: int, total: int):
        self._listed, self._per_unit, self._total = listed, per_unit, total
        self._finished = self._own = self._told = 0
        self._due_s = 0.0

    def after(self, more: int, *, in_hand: int = 0) -> int:
        """Things done, never fewer than before: `more` by us since the last call, `in_hand` of a unit not finished."""
        self._own += more
        began = time.monotonic()
        if began >= self._due_s:
            self._finished, self._own = len(self._listed()) * self._per_unit, in_hand
            ended = time.monotonic()
            self._due_s = ended + max(_COUNT_EVERY_S, (ended - began) / _SHARE)
        self._told = max(self._told, min(self._finished + self._own, self._total))
        return self._told
