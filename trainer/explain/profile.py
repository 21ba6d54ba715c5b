"""torch's profile of a few steps of a live run: asked for by a file, taken by every rank, never the run's end.

    RUN/profile/request.json                     what `flowmask profile` asks; rank 0 takes it away when it has read it
    RUN/profile/step-00000042/rank-00000.json    a Chrome trace of the steps from 42 on

Nothing is profiled unless somebody asks.
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
    """The steps that somebody wants to see."""

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]


class LiveProfile:
    """The profile of one rank; whatever goes wrong with it is said, and the run goes on."""

    def __init__(self, run: Path, *, rank: int, cuda: bool, say: Callable[[str], None]) -> None:
        self._folder, self._rank, self._cuda, self._say = run / PROFILE, rank, cuda, say
        self._profiler: Any = None
        self._first, self._left = 0, 0

    def asked(self) -> int:
        """How many steps somebody asks for, once: the request is gone then. One look at the disk if nobody does."""
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
        """Profile from now on, before the step `step`."""
        self._first, self._left = step, steps
        self._without_harm(self._start)

    def step_done(self) -> None:
        """A step is over; with the last one the trace is written."""
        if self._profiler is None:
            return
        self._left -= 1
        if self._left == 0:
            self._without_harm(self._write)

    def close(self) -> None:
        """Write what there is, if the run ends meanwhile."""
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
        except Exception as error:  # noqa: BLE001 - whatever a profiler does, training goes on
            self._profiler = None
            self._say(f"no profile: {type(error).__name__}: {' '.join(str(error).split())[:300]}; training goes on")
