"""The share of wall time that a run keeps when nodes fail: the formula against a simulated cluster."""

import random

import pytest
from trials import SEED, TRIALS

from flowmask.launch.plan.failures import Cluster, Saving, plan_saves
from flowmask.launch.plan.plan import cluster_of

HOURS = 10_000
COSTS = {  # mean time between failures, restart, stall, write, interval between saves: seconds
    "128 nodes that fail every 3 h": (10_800, 60, 0.1, 2, 60),
    "saves in flight for long": (10_800, 600, 1, 300, 900),
    "a write as long as the interval": (7_200, 120, 5, 600, 600),
    "failures in most intervals": (1_800, 300, 10, 60, 1_800),
    "a waited-for save": (10_800, 60, 30, 0, 600),
}


def played(costs: Saving, every_s: float, draws: random.Random, *, hours: int) -> float:
    """The kept part of `hours` of a run that saves, fails and continues from its newest complete checkpoint."""
    clock = kept = 0.0
    fails_at = draws.expovariate(1 / costs.mtbf_s)
    interval = max(every_s + costs.stall_s, costs.write_s)
    while clock < hours * 3600:
        saves, began = 0, clock
        while began + (saves + 1) * interval + costs.write_s <= fails_at:
            saves += 1
        kept += saves * every_s
        clock = fails_at
        fails_at = clock + draws.expovariate(1 / costs.mtbf_s)
        while fails_at < clock + costs.restart_s:
            clock = fails_at
            fails_at = clock + draws.expovariate(1 / costs.mtbf_s)
        clock += costs.restart_s
    return kept / clock


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("trial", range(TRIALS))
def test_the_formula_says_what_10_000_hours_of_failures_leave(name: str, trial: int) -> None:
    *costs, every_s = COSTS[name]
    saving = Saving(*costs)
    shares = [played(saving, every_s, random.Random(f"{SEED} {trial} {n}"), hours=HOURS // 10) for n in range(10)]
    mean = sum(shares) / 10
    error = (sum((share - mean) ** 2 for share in shares) / 90) ** 0.5
    assert abs(mean - saving.effective(every_s)) < 5 * error + 1e-4


def test_no_interval_keeps_more_than_the_advised_one() -> None:
    draws = random.Random(SEED)
    for _ in range(100):
        saving = Saving(draws.uniform(1e3, 1e7), draws.uniform(0, 3e3), draws.uniform(0, 30), draws.uniform(0, 600))
        best = saving.effective(saving.best_interval_s())
        tried = (saving.effective(saving.write_s + 1.05**n) for n in range(400) if 1.05**n < 20 * saving.mtbf_s)
        assert max(tried) <= best + 1e-4


def test_with_failures_every_3_hours_99_percent_needs_a_restart_within_a_minute_and_a_half() -> None:
    """128 nodes of 8 GPUs, Wan2.1 1.3B: the save is cheap, the restart is expensive."""

    def best(restart_min: float) -> float:
        cluster = Cluster(node_mtbf_h=3 * 128, restart_min=restart_min)
        costs = Saving.of(cluster, checkpoint_bytes=22.7e9, nodes=128, ranks=1024)
        return max(costs.effective(every_s) for every_s in range(1, 600))

    assert best(1.0) > 0.99 > best(2.0)


def test_a_plan_says_the_interval_in_steps_and_what_the_config_keeps() -> None:
    costs = Saving.of(Cluster(), checkpoint_bytes=22.7e9, nodes=1, ranks=8)
    found = plan_saves(costs, every_steps=1000, step_s=0.236)
    assert found.every_s == pytest.approx(236.0) and found.effective == costs.effective(found.every_s)
    assert found.best_effective == costs.effective(found.best_steps * 0.236) and found.best_effective > 0.998


@pytest.mark.parametrize("node_mtbf_h", [0.001, 1e9])
@pytest.mark.parametrize("restart_min", [0.0, 1e6])
def test_the_least_and_the_most_that_may_be_stated_have_a_plan(node_mtbf_h: float, restart_min: float) -> None:
    cluster = cluster_of(node_mtbf_h=node_mtbf_h, restart_min=restart_min)
    for nodes in (1, 1000):
        costs = Saving.of(cluster, checkpoint_bytes=1e6, nodes=nodes, ranks=nodes)
        found = plan_saves(costs, every_steps=1000, step_s=1e-3)
        assert 0 <= found.effective <= found.best_effective + 1e-3 <= 1.001
