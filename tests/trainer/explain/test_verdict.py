"""The slowest rank and its cause are a pure function of the time in each phase of each rank's steps."""

import random
from collections.abc import Callable

import pytest

from flowmask.trainer.explain.timeline import TimeSample
from flowmask.trainer.explain.verdict import (
    COMPUTING,
    COPYING,
    EVALUATING,
    OTHER,
    READING,
    SAVING,
    WAITING,
    a_step,
    explain,
    recent,
)
from flowmask.trainer.phases import PHASES, REDUCE

STEP = {"read": 0.02, "copy": 0.01, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "other": 0.02}
SLOWED = {
    "read": READING,
    "copy": COPYING,
    "forward": COMPUTING,
    "backward": COMPUTING,
    "optimizer": COMPUTING,
    "save": SAVING,
    "evaluate": EVALUATING,
    "other": OTHER,
}


def ranks_of(world: int, *, noise: Callable[[], float] = lambda: 1.0) -> list[dict[str, float]]:
    return [{phase: seconds * noise() for phase, seconds in STEP.items()} for _ in range(world)]


def reduced(ranks: list[dict[str, float]], *, network_s: float = 0.03) -> list[dict[str, float]]:
    """The same with each rank's wait for the last rank."""
    longest = max(sum(rank.values()) for rank in ranks)
    return [rank | {REDUCE: longest - sum(rank.values()) + network_s} for rank in ranks]


@pytest.mark.parametrize("phase", SLOWED)
@pytest.mark.parametrize("world", [2, 3, 64])
def test_the_rank_that_holds_the_others_up_is_named_with_its_cause(world: int, phase: str) -> None:
    assert set(SLOWED) == set(PHASES)
    draws = random.Random(f"{world} {phase}")
    slow, ranks = draws.randrange(world), ranks_of(world, noise=lambda: draws.uniform(0.98, 1.02))
    ranks[slow][phase] = ranks[slow].get(phase, 0.0) + 0.25
    found = explain(reduced(ranks))
    assert (found.rank, found.cause) == (slow, SLOWED[phase])
    assert found.seconds == pytest.approx(0.25, abs=0.03) and found.waits == pytest.approx(0.25 / 1.28, abs=0.04)
    assert str(found).startswith(f"Rank {slow} is the slowest: {SLOWED[phase]} takes it 0.2")


def test_a_rank_that_waits_in_the_reduction_is_not_the_slow_one() -> None:
    ranks = ranks_of(4)
    for rank in ranks[:3]:
        rank["read"] += 0.4  # three of four read slowly; the fourth waits
    found = explain(reduced(ranks))
    assert found.rank is None or found.rank < 3
    assert max(reduced(ranks)[3].values()) == reduced(ranks)[3]["backward"] or reduced(ranks)[3][REDUCE] > 0.4


@pytest.mark.parametrize(("phase", "cause"), [("read", READING), ("save", SAVING), ("copy", COPYING)])
def test_ranks_that_are_all_slowed_alike_have_the_cause_and_no_slowest(phase: str, cause: str) -> None:
    ranks = ranks_of(4)
    for rank in ranks:
        rank[phase] = 0.5
    found = explain(reduced(ranks))
    assert (found.rank, found.cause) == (None, cause) and found.share > 0.25


def test_a_slow_network_is_nobodys_fault_and_an_even_run_is_computing() -> None:
    assert explain(reduced(ranks_of(3), network_s=0.9)) == explain(reduced(ranks_of(3), network_s=0.9))
    slow, even = explain(reduced(ranks_of(3), network_s=0.9)), explain(reduced(ranks_of(3)))
    assert (slow.rank, slow.cause) == (None, WAITING) and (even.rank, even.cause) == (None, COMPUTING)
    assert explain(ranks_of(1)).cause == COMPUTING


def test_lateness_that_overlapped_reductions_show_again_as_computing_is_told_by_where_it_began() -> None:
    """A rank that reads slowly is late for the first bucket. The others wait, and seem to compute less."""
    ranks = ranks_of(2)
    ranks[0]["read"] += 0.2
    found = reduced(ranks)
    found[1]["backward"] -= 0.2
    found[1][REDUCE] += 0.2
    assert (explain(found).rank, explain(found).cause) == (0, READING)


def line(rank: int, step: int, *, world: int = 2, time: float = 0.0, **phases: float) -> TimeSample:
    total = sum(phases.values())
    return TimeSample(rank, world, "node", step, 10, time or float(step), total, dict(phases), {})


def test_only_steps_count_that_all_ranks_of_now_have_and_of_what_was_trained_twice_the_later() -> None:
    samples = [line(rank, step, forward=1.0) for step in (10, 20, 30) for rank in (0, 1)]
    samples += [line(0, 40, forward=1.0), line(0, 30, time=99.0, read=5.0)]
    samples += [line(rank, 5, world=4, time=1.0, read=9.0) for rank in range(4)]
    turns = recent(samples)
    assert [[(one.rank, one.step) for one in turn] for turn in turns] == [[(0, 20), (1, 20)], [(0, 30), (1, 30)]]
    assert a_step(turns)[0]["read"] == 5.0 / 20 and a_step(turns)[1]["forward"] == 2.0 / 20
