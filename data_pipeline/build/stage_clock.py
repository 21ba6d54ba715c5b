"""The busy time of each stage of a build: CPU time of its threads, and wall time."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Stage = Literal["decode", "encode", "write", "text"]


@dataclass
class Busy:
    """Seconds; `wall_s` is a sum over threads, so it can exceed the elapsed time."""

    cpu_s: float = 0.0
    wall_s: float = 0.0


class StageClock:
    """Sums the times of `measure`; any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: dict[Stage, Busy] = defaultdict(Busy)

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        cpu, wall = time.thread_time(), time.perf_counter()
        try:
            yield
        finally:
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            with self._lock:
                self._busy[stage].cpu_s += cpu
                self._busy[stage].wall_s += wall

    def busy(self, stage: Stage) -> Busy:
        with self._lock:
            found = self._busy[stage]
            return Busy(found.cpu_s, found.wall_s)

    def cpu_s(self) -> float:
        """CPU seconds of all stages."""
        with self._lock:
            return sum(busy.cpu_s for busy in self._busy.values())
