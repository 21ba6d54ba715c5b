"""The rank that delays the others, and the cause: a pure function of each rank's times.

A rank that waits in a reduction is not slow. All else equal, the others wait for the rank that has waited least. So
ranks are compared by their own time: all time outside of collectives.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowmask.trainer.explain.timeline import TimeSample, aligned
from flowmask.trainer.phases import PHASES, REDUCE

READING, COPYING, COMPUTING, SAVING = "reading data", "copying to the device", "computing", "saving"
EVALUATING, OTHER, WAITING = "evaluating", "other work of its process", "reducing over the network"
CAUSES = {  # in the order of a step
    READING: ("read",),
    COPYING: ("copy",),
    COMPUTING: ("forward", "backward", "optimizer"),
    SAVING: ("save",),
    EVALUATING: ("evaluate",),
    OTHER: ("other",),
}
_ADVICE = {
    READING: "Look at the disk or network file system that data comes from; a larger data.threads reads more at once.",
    COPYING: "Look at the host's memory and the link to the GPU.",
    COMPUTING: "Look at the device: its clock, its heat, another process on it.",
    SAVING: "Look at the disk that checkpoints go to; a larger checkpoint.every_steps saves less often.",
    EVALUATING: "A larger evaluate.every_steps or evaluate.every_epochs evaluates less often.",
    OTHER: "Look at what else runs on the host.",
    WAITING: "Look at the network between the ranks; more micro-batches a step reduce less often.",
}
_SLOW, _NOTABLE = 0.05, 0.10  # of a step: excess of a slow rank; share reported for equal ranks
_AS_LARGE = 0.75  # of the largest excess: in a late rank, phases that overlap collectives seem long
RECENT = 20  # samples


@dataclass(frozen=True)
class Explanation:
    """The use of time.

    rank: the slowest; None: the ranks are equal. cause: one of CAUSES, or WAITING for equal ranks. seconds: per step,
    the rank's excess by the cause, or the cause's time if the ranks are equal. share: the same as a share of a step.
    waits: the share of a step in which the other ranks wait for that rank.
    """

    rank: int | None
    cause: str
    seconds: float
    share: float
    waits: float = 0.0

    @property
    def advice(self) -> str:
        """Advice for a person; "" if nothing is wrong."""
        return "" if self.rank is None and self.cause == COMPUTING else _ADVICE[self.cause]

    def __str__(self) -> str:
        if self.rank is None:
            return f"No rank holds others up: {self.cause} takes {self.seconds:.3g} s of each step ({self.share:.0%})."
        amount = f"{self.seconds:.3g} s a step ({self.share:.0%})"
        held = f"The others wait for it {self.waits:.0%} of their time."
        return f"Rank {self.rank} is the slowest: {self.cause} takes it {amount} more than the others. {held}"


def recent(samples: Sequence[TimeSample]) -> list[list[TimeSample]]:
    """The newest samples with the present number of ranks; the first sample is left out, because a run warms up."""
    turns = aligned(samples)
    now = [turn for turn in turns if turns and len(turn) == len(turns[-1])]
    return now[max(len(now) - RECENT, min(1, len(now) - 1)) :]


def a_step(turns: Sequence[Sequence[TimeSample]]) -> list[dict[str, float]]:
    """For each rank the seconds of one step by phase: the mean over the samples' steps."""
    found = []
    for samples in zip(*turns):
        steps = sum(sample.steps for sample in samples)
        totals = {phase: sum(s.phases.get(phase, 0.0) for s in samples) for phase in (*PHASES, REDUCE)}
        found.append({phase: seconds / steps for phase, seconds in totals.items()})
    return found


def explain(ranks: Sequence[Mapping[str, float]]) -> Explanation:
    """The slowest rank and the cause, from each rank's seconds of one step by phase."""
    own = [sum(seconds for phase, seconds in rank.items() if phase != REDUCE) for rank in ranks]
    step = max(mine + rank.get(REDUCE, 0.0) for mine, rank in zip(own, ranks)) or 1.0
    slowest = max(range(len(ranks)), key=own.__getitem__)
    others = [number for number in range(len(ranks)) if number != slowest]
    excess = own[slowest] - statistics.median(own[n] for n in others) if others else 0.0
    if excess <= _SLOW * step:
        return _of_all(ranks, step=step)
    more = {
        cause: _of(ranks[slowest], cause) - statistics.median(_of(ranks[n], cause) for n in others) for cause in CAUSES
    }
    cause = next(cause for cause, seconds in more.items() if seconds >= _AS_LARGE * max(more.values()))
    waits = statistics.fmean(ranks[n].get(REDUCE, 0.0) for n in others) - ranks[slowest].get(REDUCE, 0.0)
    return Explanation(slowest, cause, more[cause], more[cause] / step, waits=max(0.0, waits) / step)


def _of(rank: Mapping[str, float], cause: str) -> float:
    return sum(rank.get(phase, 0.0) for phase in CAUSES[cause])


def _of_all(ranks: Sequence[Mapping[str, float]], *, step: float) -> Explanation:
    """The largest time of equal ranks apart from computing; computing if no other is notable."""
    shares = {cause: statistics.fmean(_of(rank, cause) for rank in ranks) for cause in CAUSES}
    shares[WAITING] = statistics.fmean(rank.get(REDUCE, 0.0) for rank in ranks)
    most = max((cause for cause in shares if cause != COMPUTING), key=shares.__getitem__)
    cause = most if shares[most] > _NOTABLE * step else COMPUTING
    return Explanation(None, cause, shares[cause], shares[cause] / step)
