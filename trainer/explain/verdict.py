"""Which rank holds the others up, and by what: a pure function of what each rank's steps were spent on.

A rank that waits in a reduction is not slow: it is the one that has waited least, all else being equal, for whom the
others wait. So ranks are compared by their own time, which is all but that in collectives.
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
_SLOW, _NOTABLE = 0.05, 0.10  # of a step: what makes a rank slow; what is told of ranks that are alike
_AS_LARGE = 0.75  # of the largest excess: being late makes later phases seem long where collectives overlap them
RECENT = 20  # samples


@dataclass(frozen=True)
class Explanation:
    """Where the time goes.

    rank: the slowest; None: the ranks are alike. cause: of CAUSES, or WAITING of ranks that are alike. seconds: of a
    step, by which the cause sets that rank apart, or that it takes of all. share: the same as a part of a step.
    waits: the part of a step that the other ranks wait for that rank.
    """

    rank: int | None
    cause: str
    seconds: float
    share: float
    waits: float = 0.0

    @property
    def advice(self) -> str:
        """Where to look; "" where nothing is wrong."""
        return "" if self.rank is None and self.cause == COMPUTING else _ADVICE[self.cause]

    def __str__(self) -> str:
        if self.rank is None:
            return f"No rank holds others up: {self.cause} takes {self.seconds:.3g} s of each step ({self.share:.0%})."
        amount = f"{self.seconds:.3g} s a step ({self.share:.0%})"
        held = f"The others wait for it {self.waits:.0%} of their time."
        return f"Rank {self.rank} is the slowest: {self.cause} takes it {amount} more than the others. {held}"


def recent(samples: Sequence[TimeSample]) -> list[list[TimeSample]]:
    """The newest samples that all ranks of now have; the very first is left out, as a run warms up in it."""
    turns = aligned(samples)
    now = [turn for turn in turns if turns and len(turn) == len(turns[-1])]
    return now[max(len(now) - RECENT, min(1, len(now) - 1)) :]


def a_step(turns: Sequence[Sequence[TimeSample]]) -> list[dict[str, float]]:
    """For each rank the seconds of one step by phase, the mean over the samples' steps."""
    found = []
    for samples in zip(*turns):
        steps = sum(sample.steps for sample in samples)
        totals = {phase: sum(s.phases.get(phase, 0.0) for s in samples) for phase in (*PHASES, REDUCE)}
        found.append({phase: seconds / steps for phase, seconds in totals.items()})
    return found


def explain(ranks: Sequence[Mapping[str, float]]) -> Explanation:
    """The slowest rank and why, from the seconds of one step by phase, for each rank."""
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
    """What ranks that are alike spend most on, beside computing; computing, if nothing else is notable."""
    shares = {cause: statistics.fmean(_of(rank, cause) for rank in ranks) for cause in CAUSES}
    shares[WAITING] = statistics.fmean(rank.get(REDUCE, 0.0) for rank in ranks)
    most = max((cause for cause in shares if cause != COMPUTING), key=shares.__getitem__)
    cause = most if shares[most] > _NOTABLE * step else COMPUTING
    return Explanation(None, cause, shares[cause], shares[cause] / step)
