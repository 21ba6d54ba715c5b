"""The time of a rank: seconds by phase of its steps, and the part of them spent waiting for other ranks.

A phase lasts until the next one begins. On a CPU the marks are host times. On a GPU they are events in the device's
queue; they are read one lap later, when they have passed, so nothing here waits for the device. Code that only
reads the measurements imports this file without torch.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

PHASES = ("read", "copy", "forward", "backward", "optimizer", "save", "evaluate", "other")  # of a rank itself
REDUCE = "reduce"  # in collectives: waiting and sending


class Call(NamedTuple):
    """A collective that this rank has begun; `number` counts them from 1, equal on all ranks."""

    number: int
    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""

    def __str__(self) -> str:
        size = f" ({self.dtype} {list(self.shape)})" if self.dtype else ""
        return f"{self.name} number {self.number}{size}"


@dataclass(frozen=True)
class Spent:
    """The time of `steps` steps: seconds in total and by phase; `reduce` is not part of the other phases."""

    steps: int
    total_s: float
    phases: dict[str, float]


class _Lap(NamedTuple):
    marks: list[tuple[str, Any]]  # a phase and its beginning; the last is the end of the lap
    waits: list[tuple[str, Any, Any]]  # phase, beginning, end
    copied_s: float  # the part of reading spent copying to the device


class Phases:
    """The stopwatch of one rank. A lap is one step, from the end of the last step to its own end.

    Only the main thread uses it; other threads may only read `last` and `waiting_for`.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._clock: _DeviceClock | _HostClock = _DeviceClock() if device == "cuda" else _HostClock()
        self._depth, self._begun = 0, 0
        self.last: Call | None = None
        self.waiting_for: Call | None = None
        self._ripe: deque[_Lap] = deque()
        self.restart()

    def restart(self) -> None:
        """Delete all measurements: a lap begins now."""
        self._ripe.clear()
        self._sums: dict[str, float] = defaultdict(float)
        self._steps, self._total_s = 0, 0.0
        self._lap = _Lap([("other", self._clock.stamp())], [], 0.0)

    @property
    def phase(self) -> str:
        """The present phase of this rank."""
        return self._lap.marks[-1][0]

    def enter(self, phase: str) -> None:
        """Begin this phase, one of PHASES."""
        self._lap.marks.append((phase, self._clock.stamp()))

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """This phase inside the block, then the earlier one again."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def copied(self, seconds: float) -> None:
        """Count these seconds of the lap's reading as copying to the device."""
        self._lap = self._lap._replace(copied_s=self._lap.copied_s + seconds)

    def begin(self, name: str, arguments: Iterable[Any]) -> Call:
        """A collective is called; its shape is that of the first tensor, of any shape, among its arguments."""
        self._begun += 1
        tensor = next((one for one in arguments if hasattr(one, "shape") and hasattr(one, "dtype")), None)
        sized = () if tensor is None else (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        self.last = Call(self._begun, name, *sized)
        return self.last

    @contextmanager
    def waiting(self, call: Call) -> Iterator[None]:
        """The time in the block counts as waiting; a collective made of other collectives counts once."""
        if self._depth:
            yield
            return
        self._depth, self.waiting_for, begun = 1, call, self._clock.stamp()
        try:
            yield
        finally:
            self._depth, self.waiting_for = 0, None
            self._lap.waits.append((self.phase, begun, self._clock.stamp()))

    def end_lap(self) -> None:
        """A step has ended."""
        now, phase = self._clock.stamp(), self.phase
        self._lap.marks.append(("", now))
        self._ripe.append(self._lap)
        self._lap = _Lap([(phase, now)], [], 0.0)
        while len(self._ripe) > self._clock.LAPS_LATE:
            self._add(self._ripe.popleft())

    def take(self) -> Spent:
        """The times of the laps since the last call, as far as the clock knows them."""
        found = Spent(self._steps, self._total_s, dict(self._sums))
        self._sums, self._steps, self._total_s = defaultdict(float), 0, 0.0
        return found

    def _add(self, lap: _Lap) -> None:
        seconds = self._clock.seconds
        waited_for = [mark for _, *both in lap.waits for mark in both]  # may be on other queues than the lap's
        if not all(map(self._clock.is_past, (lap.marks[-1][1], *waited_for))):
            return
        for (phase, begun), (_, ended) in zip(lap.marks, lap.marks[1:]):
            self._sums[phase] += seconds(begun, ended)
        for phase, begun, ended in lap.waits:
            waited = seconds(begun, ended)
            self._sums[phase] -= waited
            self._sums[REDUCE] += waited
        self._sums["read"] -= lap.copied_s
        self._sums["copy"] += lap.copied_s
        self._steps += 1
        self._total_s += seconds(lap.marks[0][1], lap.marks[-1][1])
        self._clock.keep([*(mark for _, mark in lap.marks[:-1]), *waited_for])  # the last mark begins the next lap


class _HostClock:
    LAPS_LATE = 0
    stamp: Callable[[], Any] = staticmethod(perf_counter)

    def seconds(self, begun: Any, ended: Any) -> float:
        return float(ended - begun)

    def is_past(self, mark: Any) -> bool:
        return True

    def keep(self, marks: list[Any]) -> None:
        """Does nothing: times are not reused."""


class _DeviceClock:
    """CUDA events; they are reused, because making one costs more than recording it."""

    LAPS_LATE = 1

    def __init__(self) -> None:
        import torch

        self._new = partial(torch.cuda.Event, enable_timing=True)
        self._free: list[Any] = []

    def stamp(self) -> Any:
        event = self._free.pop() if self._free else self._new()
        event.record()
        return event

    def seconds(self, begun: Any, ended: Any) -> float:
        return float(begun.elapsed_time(ended)) / 1000

    def is_past(self, mark: Any) -> bool:
        return bool(mark.query())

    def keep(self, marks: list[Any]) -> None:
        self._free += marks


class Pending:
    """An asynchronous collective in progress: torch's own handle, whose `wait` is timed."""

    def __init__(self, work: Any, call: Call, phases: Phases) -> None:
        self._work, self._call, self._phases = work, call, phases

    def wait(self, *args: Any, **named: Any) -> Any:
        """Wait for it, as torch's handle does."""
        with self._phases.waiting(self._call):
            return self._work.wait(*args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def finite(seconds: float) -> float:
    """A number that JSON can hold; seconds slightly below zero, from differing clocks, become zero."""
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
