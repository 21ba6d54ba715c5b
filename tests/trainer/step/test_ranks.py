"""The number of ranks and the micro-batch leave every batch the same, and its loss almost the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import losses, rows, run_group, start

from flowmask.models.process import REQUEUE_EXIT_CODE

STEPS = 12
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
CUTS = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4)]  # ranks x micro-batch of 8 examples, accumulated
MORE = [(4, 1), (4, 2), (8, 1)]


def overrides(precision: str, micro: int) -> dict[str, Any]:
    return {
        "train.precision": precision,
        "train.micro_batch": micro,
        "train.global_batch": 8,
        "train.steps": STEPS,
        "checkpoint.every_steps": 100,
    }


@pytest.fixture(scope="module")
def by_ranks(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<precision>_<ranks>_<micro-batch>`: the same training with every split of its batch."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    jobs = []
    for precision in TOLERANCE:
        for ranks, micro in CUTS:
            out = folder / f"{precision}_{ranks}_{micro}"
            if ranks == 1:
                start(lab, out, overrides(precision, micro))
            else:
                jobs.append({"lab": str(lab), "out": str(out), "overrides": overrides(precision, micro)})
    one_stopped = {"lab": str(lab), "out": str(folder / "stopped"), "overrides": overrides("fp32", 2)}
    jobs += [one_stopped | {"signal_rank": 1, "code": REQUEUE_EXIT_CODE}, one_stopped]
    run_group(jobs, folder=folder / "two")
    return folder


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(("ranks", "micro"), CUTS)
def test_batches_are_the_same_and_losses_too_at_any_ranks_and_micro_batch(
    by_ranks: Path, precision: str, micro: int, ranks: int
) -> None:
    one, other = by_ranks / f"{precision}_1_1", by_ranks / f"{precision}_{ranks}_{micro}"
    assert [row["batch"] for row in rows(other)] == [row["batch"] for row in rows(one)]
    assert {row["world_size"] for row in rows(other)} == {ranks}
    assert losses(other) == pytest.approx(losses(one), rel=TOLERANCE[precision])


@pytest.mark.parametrize("ranks", [4, 8])
def test_so_they_are_with_four_and_with_eight_ranks(lab: Path, by_ranks: Path, tmp_path: Path, ranks: int) -> None:
    cuts = [micro for some, micro in MORE if some == ranks]
    jobs = [
        {"lab": str(lab), "out": str(tmp_path / f"{p}_{micro}"), "overrides": overrides(p, micro)}
        for p in TOLERANCE
        for micro in cuts
    ]
    run_group(jobs, folder=tmp_path / "logs", ranks=ranks)
    for precision in TOLERANCE:
        one = by_ranks / f"{precision}_1_1"
        for micro in cuts:
            other = tmp_path / f"{precision}_{micro}"
            assert [row["batch"] for row in rows(other)] == [row["batch"] for row in rows(one)]
            assert losses(other) == pytest.approx(losses(one), rel=TOLERANCE[precision])


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_costs_nothing(by_ranks: Path) -> None:
    log = (by_ranks / "stopped" / "log.txt").read_text()
    assert "saved step_00000005" in log and "continuing from step_00000005" in log
    assert losses(by_ranks / "stopped") == losses(by_ranks / "fp32_2_2")
