"""The search: one setting after another, each a change of the fastest so far, until the time limit.

Independent of the kind of job, and starts no process: the timing function and the clock are parameters.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flowmask.launch.jobs.job import Job

GAIN = 0.98  # share of the best time below which a candidate counts as faster; less may be noise
Changes = Mapping[str, Any]  # dotted keys


@dataclass(frozen=True)
class Timing:
    """The result of one candidate.

    changes: from the given config; unit_s: seconds per step, or per clip of a cache, None if not timed; seconds:
    of each timed step or clip, in order; waits: share of the time spent waiting for data; device_gib: peak memory
    of a GPU; said: why it was not timed; no_room: it did not fit into memory; planned: an estimate showed before
    the trial that it would not fit.
    """

    changes: Changes
    unit_s: float | None = None
    seconds: tuple[float, ...] = ()
    waits: float = 0.0
    device_gib: float | None = None
    said: str = ""
    no_room: bool = False
    planned: bool = False

    @property
    def label(self) -> str:
        return as_words(self.changes) or "as given"


class Times(Protocol):
    """Times a job, until `until` at the latest or until it is clearly slower than `best`."""

    def __call__(self, job: Job, changes: Changes, *, until: float, best: Timing) -> Timing: ...


class Memory(Protocol):
    """Estimates of the memory that jobs need."""

    def refuses(self, job: Job) -> str:
        """Why a job can't fit; empty if it may fit."""

    def is_too_small_for(self, job: Job) -> None:
        """Record a job that did not fit."""


class Search:
    """A coordinate descent over `axes`; `best` is the job to change next."""

    def __init__(
        self,
        given: Job,
        *,
        times: Times,
        changed: Callable[[Changes], Job | None],
        memory: Memory,
        until: float,
        clock: Callable[[], float],
    ) -> None:
        """changed: returns the given job with these changes, or None if its config refuses them; until: on `clock`."""
        self.best, self.best_timing = given, Timing({}, said="not timed yet")
        self.timings: list[Timing] = []
        self.last: Timing | None = None  # of the last offer; None if it was skipped
        self.time_is_over = False
        self._times, self._changed, self._memory = times, changed, memory
        self._until, self._clock = until, clock
        self._given = given
        self._quickest_s: float | None = None  # from the start of a candidate to its timing

    @property
    def fits(self) -> bool:
        """Whether any job has run."""
        return self.best_timing.unit_s is not None

    @property
    def best_s(self) -> float:
        """Seconds per unit of the best job; infinite if none has run."""
        return self.best_timing.unit_s or math.inf

    def run(self, axes: Sequence["Axis"]) -> None:
        """Time the given job, then the offers of each axis, while there is time for one more."""
        self._try({})
        for axis in axes:
            for changes in axis(self):
                if self._clock() + (self._quickest_s or 0) >= self._until:
                    self.time_is_over = True
                    return
                self._try(changes)

    def _try(self, changes: Changes) -> None:
        """Time the best job with these changes, unless it was timed, the config refuses it, or it can't fit."""
        self.last = None
        wanted = {**self.best_timing.changes, **changes}
        wanted = {key: value for key, value in wanted.items() if value_of(self._given, key) != value}
        if any(timing.changes == wanted for timing in self.timings):
            return
        job = self._changed(wanted)
        if job is None:
            return
        if wanted and (why := self._memory.refuses(job)):
            self._note(Timing(wanted, said=why, no_room=True, planned=True))
            return
        began = self._clock()
        timing = self._times(job, wanted, until=self._until, best=self.best_timing)
        self._note(timing)
        if timing.no_room:
            self._memory.is_too_small_for(job)
        if timing.unit_s is None:
            return
        took = self._clock() - began
        self._quickest_s = took if self._quickest_s is None else min(self._quickest_s, took)
        if timing.unit_s < GAIN * self.best_s:
            self.best, self.best_timing = job, timing

    def _note(self, timing: Timing) -> None:
        self.last = timing
        self.timings.append(timing)


Axis = Callable[[Search], Iterator[Changes]]  # reads `best` before each offer


def value_of(job: Job, key: str) -> Any:
    """The value of a job at a dotted key."""
    value: Any = job
    for name in key.split("."):
        value = getattr(value, name)
    return value


def as_words(changes: Changes) -> str:
    """The changes in the form of a command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
