"""All observers of one rank's training: its stopwatch, its timeline, its watchdog, and profiles on request."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Self

from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.explain.hang import HANG, LIMIT, Watchdog
from flowmask.trainer.explain.node import node_watched
from flowmask.trainer.explain.profile import LiveProfile
from flowmask.trainer.explain.timeline import TimelineFile
from flowmask.trainer.phases import Phases
from flowmask.trainer.state.owner import read_start


class Witness:
    """One per rank of a run; `run_state` calls the same methods on all ranks; none is collective.

    step: the step after which training continues; say: rank 0's log. It takes samples and looks for requests every
    `train.log_every_steps`.
    """

    def __init__(self, config: RunConfig, *, step: int, say: Callable[[str], None]) -> None:
        device, rank, world_size = distributed.device().type, distributed.rank(), distributed.world_size()
        self.phases = Phases(device)
        self._run, self._tracking, self._say = config.out, config.tracking, say
        self._every, self._step = config.train.log_every_steps, step
        self._timeline = TimelineFile(self._run, rank=rank, world_size=world_size)
        self._profile = LiveProfile(self._run, rank=rank, cuda=device == "cuda", say=say)
        self._limit_s = LIMIT * config.train.collective_timeout_s
        self._rank, self._world_size = rank, world_size
        self._watchdog: Watchdog | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Training begins: observe until it ends."""
        start = read_start(self._run)
        folder = self._run / HANG / f"{start.number if start is not None else 1:04d}"
        self._watchdog = Watchdog(
            folder, self.phases, limit_s=self._limit_s, rank=self._rank, world_size=self._world_size, say=self._say
        )
        for close in (self._timeline.close, self._watchdog.close, self._profile.close):
            self._open.callback(close)
        self._open.enter_context(distributed.watched(self.phases))
        self._open.enter_context(node_watched(self._run, self._tracking, rank=self._rank))
        self._watchdog.beat(self._step)
        self.phases.restart()
        return self

    def __exit__(self, *_: object) -> None:
        """Training has ended; add a sample of the steps since the last one."""
        self._timeline.add(self._step, self.phases.take())
        self._open.close()

    def profile_asked(self, step: int) -> int:
        """The requested number of steps to profile: rank 0 looks, at steps with samples, and tells the other ranks."""
        return self._profile.asked() if self._rank == 0 and step != self._step and step % self._every == 0 else 0

    def agreed(self, step: int, *, profile_steps: int) -> None:
        """All ranks have communicated after `step` steps; several times per step if an evaluation does so too."""
        if self._watchdog is not None:
            self._watchdog.beat(step)
        if step == self._step:
            return
        self._step = step
        self.phases.end_lap()
        self._profile.step_done()
        if profile_steps:
            self._profile.begin(step + 1, steps=profile_steps)
        if step % self._every == 0:
            self._timeline.add(step, self.phases.take())
