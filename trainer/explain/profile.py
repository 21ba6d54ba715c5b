"""torch's profile of a few steps of a live run: requested by a file, recorded by every rank; it never ends the run.

    RUN/profile/request.json                     the request of `flowmask profile`; rank 0 deletes it after reading
    RUN/profile/step-00000042/rank-00000.json    a Chrome trace of the steps from 42 on

Without a request nothing is profiled.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from flowmask.models.stored.typed import read_as

PROFILE, REQUEST = "profile", "request.json"
MOST_STEPS = 50


@dataclass(frozen=True)
class ProfileRequest:
    """The steps to profile."""

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]


class LiveProfile:
    """The profile of one rank; a fault is reported, and the run continues."""

    def __init__(self, run: Path, *, rank: int, cuda: bool, say: Callable[[str], None]) -> None:
        self._folder, self._rank, self._cuda, self._say = run / PROFILE, rank, cuda, say
        self._profiler: Any = None
        self._first, self._left = 0, 0

    def asked(self) -> int:
        """The number of requested steps, once: then the request is deleted. Without one it costs one disk access."""
        path = self._folder / REQUEST
        if self._profiler is not None or not path.exists():
            return 0
        steps = 0
        with suppress(OSError):
            try:
                steps = read_as(path, ProfileRequest).steps
            except ValueError as error:
                self._say(f"{path} asks for no profile: {error}")
            path.unlink(missing_ok=True)
        return steps

    def begin(self, step: int, *, steps: int) -> None:
        """Profile from the step `step` on."""
        self._first, self._left = step, steps
        self._without_harm(self._start)

    def step_done(self) -> None:
        """A step has ended; after the last one the trace is written."""
        if self._profiler is None:
            return
        self._left -= 1
        if self._left == 0:
            self._without_harm(self._write)

    def close(self) -> None:
        """Write the partial trace if the run ends early."""
        if self._profiler is not None:
            self._without_harm(self._write)

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        profiler = profile(activities=activities)
        profiler.start()
        self._profiler = profiler

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = self._folder / f"step-{self._first:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self._rank:05d}.json"
        beside = path.with_name(f".writing-{path.name}")
        profiler.export_chrome_trace(str(beside))
        beside.rename(path)
        self._say(f"profiled the steps from {self._first} on: {folder}; open a trace at https://ui.perfetto.dev")

    def _without_harm(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - training continues after any fault of a profiler
            self._profiler = None
            self._say(f"no profile: {type(error).__name__}: {' '.join(str(error).split())[:300]}; training goes on")
