"""How long each stage of a build was busy: CPU time of the threads that ran it, and wall time."""

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
    """Seconds; `wall_s` is summed over threads, so it may pass the time that went by."""

    cpu_s: float = 0.0
    wall_s: float = 0.0


class StageClock:
    """Adds up what `measure` measured; any thread may use it."""

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
