"""The search: one setting after another, each from the fastest that was found so far, until the time is over.

Knows no kind of job and starts no process: who times a candidate, and the clock, are handed in.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flowmask.launch.jobs.job import Job

GAIN = 0.98  # a candidate is faster when it takes less than this share of the best time: below that it may be noise
Changes = Mapping[str, Any]  # dotted keys


@dataclass(frozen=True)
class Timing:
    """What became of one candidate.

    changes: from the config as given; unit_s: seconds of a step, or of a cache's clip, None if it has no time;
    seconds: of each one that was timed, in order; waits: share of the time spent on waiting for data;
    device_gib: the most on a GPU; said: why there is no time; no_room: for want of memory; planned: which was known
    before it was tried.
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
    """Times a job until `until` at the latest, or until it is clear that it is slower than `best`."""

    def __call__(self, job: Job, changes: Changes, *, until: float, best: Timing) -> Timing: ...


class Memory(Protocol):
    """What is known of the memory that jobs need."""

    def refuses(self, job: Job) -> str:
        """Why a job can't fit; empty if it may."""

    def is_too_small_for(self, job: Job) -> None:
        """Note a job that did not fit."""


class Search:
    """A coordinate descent over `axes`; `best` is the job to be changed next."""

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
        """changed: the given job with these changes, None if its config refuses them; until: on `clock`."""
        self.best, self.best_timing = given, Timing({}, said="not timed yet")
        self.timings: list[Timing] = []
        self.last: Timing | None = None  # of what was offered last; None where it was passed over
        self.time_is_over = False
        self._times, self._changed, self._memory = times, changed, memory
        self._until, self._clock = until, clock
        self._given = given
        self._quickest_s: float | None = None  # from the start of a candidate to its time

    @property
    def fits(self) -> bool:
        """Whether a job has run."""
        return self.best_timing.unit_s is not None

    @property
    def best_s(self) -> float:
        """Seconds of a unit of the best job; infinite while none has run."""
        return self.best_timing.unit_s or math.inf

    def run(self, axes: Sequence["Axis"]) -> None:
        """Time the given job, then what each axis offers, as long as there is time for one more."""
        self._try({})
        for axis in axes:
            for changes in axis(self):
                if self._clock() + (self._quickest_s or 0) >= self._until:
                    self.time_is_over = True
                    return
                self._try(changes)

    def _try(self, changes: Changes) -> None:
        """Time the best job with these changes, unless that was done, its config refuses it, or it can't fit."""
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


Axis = Callable[[Search], Iterator[Changes]]  # looks at `best` each time it is asked for its next offer


def value_of(job: Job, key: str) -> Any:
    """What a job has at a dotted key."""
    value: Any = job
    for name in key.split("."):
        value = getattr(value, name)
    return value


def as_words(changes: Changes) -> str:
    """As they are typed on a command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
