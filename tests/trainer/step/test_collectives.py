"""The collectives of two ranks in a step are counted to the byte, at every ZeRO stage."""

import itertools
from collections import Counter
from typing import Any

import pytest
from scenarios import PERSISTENT, PRECISIONS, STAGES, tiny_dit

MICRO_BATCHES = 2  # in a rank's step, with a micro-batch of 2
AGREED = ("allreduce_", 8 * (2 + 5))  # loss and a metric, four limbs of the digest, number of non-finite values
Collectives = Counter[tuple[str, int]]


def expected(stage: int, precision: str) -> Collectives:
    """Name, and bytes of the whole tensor. All gradients fit into one of DeepSpeed's buckets, in fp32."""
    sizes = [parameter.numel() for parameter in tiny_dit().parameters()]
    weight, everything = (4 if precision == "fp32" else 2), sum(sizes)
    if stage == 0:
        return Counter([AGREED, ("allreduce_", 4 * sum(-(-size // 64) * 64 for size in sizes))])
    if stage < 3:
        times = 1 if stage == 1 else MICRO_BATCHES  # whole gradients once at the end, or sharded each time
        whole_norm = (stage, precision) == (1, "bf16")  # each rank has all gradients, and computes the norm alone
        norm = [] if whole_norm else [("allreduce_", 4)]
        return Counter(
            [AGREED, *norm, *[("allreduce_", 4 * everything)] * times, ("_allgather_base_", weight * everything)]
        )
    kept = [size for size in sizes if size <= PERSISTENT]  # whole on every rank: gathered once, after an update
    fetched = ("_allgather_base_", weight * (everything - sum(kept)))  # once for both passes of a micro-batch
    reduced = ("_reduce_scatter_base_", 4 * everything)
    return Counter(
        [
            *(AGREED, ("allreduce_", 8)),
            *([fetched, reduced] * MICRO_BATCHES),
            *(("_allgather_base_", weight * size) for size in kept),
        ]
    )


@pytest.mark.parametrize(("precision", "stage"), list(itertools.product(PRECISIONS, STAGES)))
def test_a_step_reduces_and_gathers_what_its_zero_stage_needs_and_nothing_more(
    two_ranks: list[dict[str, Any]], precision: str, stage: int
) -> None:
    for rank in two_ranks:
        assert Counter(rank["trajectories"][f"{precision}/{stage}/2"]["collectives"]) == expected(stage, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_below_zero_2_ranks_speak_once_a_step_however_many_micro_batches_it_has(
    two_ranks: list[dict[str, Any]], precision: str
) -> None:
    for micro in (1, 4):
        found = two_ranks[0]["trajectories"][f"{precision}/1/{micro}"]["collectives"]
        assert Counter(found) == expected(1, precision)


def test_what_is_gathered_or_reduced_twice_is_found(two_ranks: list[dict[str, Any]]) -> None:
    clean, found = expected(3, "bf16"), two_ranks[0]["twice"]
    assert Counter(found["reduced"]) - clean == Counter([AGREED])
    small = [parameter.numel() for parameter in tiny_dit().parameters() if parameter.numel() <= PERSISTENT]
    assert Counter(found["gathered"]) - clean == Counter(("_allgather_base_", 2 * size) for size in small)
