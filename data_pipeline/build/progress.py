"""The progress of all workers of a build, counted with few questions to the disk."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

Phase = Literal["plan", "cost", "text", "clips", "finalise", "complete"]
_COUNT_EVERY_S = 1.0
_SHARE = 0.02  # largest share of the time that counting takes


@dataclass(frozen=True)
class BuildProgress:
    """The progress of all workers together in a phase: units of `text` are sentences, units of `clips` are clips."""

    phase: Phase
    done: int
    total: int
    note: str = ""  # a line for the waiting person


OnProgress = Callable[[BuildProgress], None]


class ProgressCount:
    """Things that all workers have done in a phase, of `total`; `listed` lists finished units of `per_unit` things.

    A listing costs time for every unit, so it is rare; between listings this worker's own work is added.
    """

    def __init__(self, listed: Callable[[], Collection[int]], *, per_unit: int, total: int):
        self._listed, self._per_unit, self._total = listed, per_unit, total
        self._finished = self._own = self._told = 0
        self._due_s = 0.0

    def after(self, more: int, *, in_hand: int = 0) -> int:
        """Things done, never decreasing: `more` by this worker since the last call, `in_hand` in its current unit."""
        self._own += more
        began = time.monotonic()
        if began >= self._due_s:
            self._finished, self._own = len(self._listed()) * self._per_unit, in_hand
            ended = time.monotonic()
            self._due_s = ended + max(_COUNT_EVERY_S, (ended - began) / _SHARE)
        self._told = max(self._told, min(self._finished + self._own, self._total))
        return self._told
