"""A step that takes too long: every rank writes the stacks of its threads and the collective in which it waits.

    RUN/hang/0001-step-00000042/rank-00000.txt    the stacks
    RUN/hang/0001-step-00000042/rank-00000.json   the last collective it has begun, and whether it waits in it

0001 counts the starts of the run. From these files any rank can name the missing one. NCCL's own record is in the
same folder, as nccl_rank_0: torch writes it when a collective has timed out.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from flowmask.models.files import write_atomically
from flowmask.models.stored.typed import read_as
from flowmask.trainer.phases import Call, Phases

HANG = "hang"
LIMIT = 0.5  # of train.collective_timeout_s: the stacks exist before the first rank gives up
_GRACE_S = 5.0  # for files of ranks whose clocks began a little later
_LOOKS = 8  # within the limit
_SHOWN = 8  # ranks


@dataclass(frozen=True)
class Stuck:
    """One rank's report: its last begun collective, whether it waits in it, and its main thread's position."""

    pid: int
    step: int
    seconds: float
    phase: Annotated[str, Field(max_length=50)]
    number: int
    collective: Annotated[str, Field(max_length=500)]
    waits: bool
    at: Annotated[str, Field(max_length=500)]

    def __str__(self) -> str:
        return f"in phase {self.phase} at {self.at}"


class Watchdog:
    """Watches from a thread: if no step has ended for `limit_s`, it writes this rank's state once.

    say: one line for a person, logged by rank 0; the missing rank is known once the others have written.
    """

    def __init__(
        self, folder: Path, phases: Phases, *, limit_s: float, rank: int, world_size: int, say: Callable[[str], None]
    ) -> None:
        """folder: RUN/hang/ and the number of this start; the step is added."""
        self._folder, self._phases, self._limit_s, self._say = folder, phases, limit_s, say
        self._rank, self._world_size = rank, world_size
        self._beat, self._step = time.monotonic(), 0
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """All ranks have reached this step."""
        self._step, self._beat = step, time.monotonic()

    def close(self) -> None:
        """Stop the thread."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        told = -1.0
        while not self._end.wait(self._limit_s / _LOOKS):
            beat, step = self._beat, self._step
            if beat != told and time.monotonic() - beat > self._limit_s:
                told = beat
                with suppress(OSError):
                    self._tell(step + 1, seconds=time.monotonic() - beat)

    def _tell(self, step: int, *, seconds: float) -> None:
        folder = self._folder.with_name(f"{self._folder.name}-step-{step:08d}")
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"rank-{self._rank:05d}.txt"
        with own.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        call = self._phases.last or Call(0, "no collective")
        stuck = Stuck(
            pid=os.getpid(),
            step=step,
            seconds=seconds,
            phase=self._phases.phase,
            number=call.number,
            collective=str(call)[:500],
            waits=self._phases.waiting_for is not None,
            at=self._place(),
        )
        write_atomically(own.with_suffix(".json"), json.dumps(asdict(stuck)))
        if not self._end.wait(min(_GRACE_S, self._limit_s / 4)):
            words = who_is_missing(read_hang(folder), self._world_size)
            self._say(f"step {step} has taken {seconds:.0f} s. {words}. Stacks of every rank: {folder}")

    def _place(self) -> str:
        """File, line and function of the main thread's position."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "?"
        code = frame.f_code
        return f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"[:500]


def read_hang(folder: Path) -> dict[int, Stuck]:
    """The reports of the ranks in one folder, by rank."""
    found = {}
    for path in sorted(folder.glob("rank-*.json")):
        with suppress(OSError, ValueError):
            found[int(path.stem.removeprefix("rank-"))] = read_as(path, Stuck)
    return found


def who_is_missing(stuck: Mapping[int, Stuck], world_size: int) -> str:
    """The ranks missing in the collective in which the others wait, in one sentence; a pure function."""
    silent = [rank for rank in range(world_size) if rank not in stuck]
    furthest = max((one.number for one in stuck.values()), default=0)
    waiting = next((one for one in stuck.values() if one.number == furthest and one.waits), None)
    # NCCL's collectives are queued without waiting, so only their numbers show it
    left = waiting is not None
    behind = [rank for rank, one in stuck.items() if one.number < furthest or (left and not one.waits)]
    place = f"come to {waiting.collective}, in which the others wait" if waiting is not None else "end its step"
    if silent:
        return f"{_ranks(silent)} did not {place}, and left no stack: gone or stopped"
    if not behind:
        there = next(iter(stuck.values()))
        what = f"all wait in {waiting.collective}: look at the network" if waiting is not None else f"all are {there}"
        return f"No rank is behind, {what}"
    return f"{_ranks(behind)} did not {place}, but {'is' if len(behind) == 1 else 'are'} {stuck[behind[0]]}"


def told_by_own_stack(run: Path) -> str:
    """The sentence of `who_is_missing` for a run's newest hang, if this process has written a stack there; else ""."""
    for folder in sorted((run / HANG).glob("*-step-*"), reverse=True):
        stuck = read_hang(folder)
        own = stuck.get(int(os.environ.get("RANK", "0")))
        if own is not None and own.pid == os.getpid():
            return f"{who_is_missing(stuck, int(os.environ.get('WORLD_SIZE', '1')))}. Stacks of every rank: {folder}"
    return ""


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
    return f"Rank{'s' * (len(numbers) > 1)} {shown}"
