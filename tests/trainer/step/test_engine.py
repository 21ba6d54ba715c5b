"""One optimizer step is the same step at every ZeRO stage, world size, micro-batch and precision."""

import itertools
from typing import Any

import pytest
import torch
from scenarios import PRECISIONS, SAVED, STAGES, STEPS, TOKENS, Velocity, assert_same_training, global_batch, tiny_dit
from tolerance import add_apart, summed

from flowmask.models.errors import ConfigError
from flowmask.trainer.step.engine import Engine

per_engine = pytest.mark.parametrize(("precision", "stage"), list(itertools.product(PRECISIONS, STAGES)))


@per_engine
def test_the_masters_start_as_the_exact_initial_weights(
    two_ranks: list[dict[str, Any]], precision: str, stage: int
) -> None:
    assert two_ranks[0]["trajectories"][f"{precision}/{stage}/2"]["starts_exact"]


@per_engine
def test_the_zero_stage_does_not_change_the_training(
    two_ranks: list[dict[str, Any]], precision: str, stage: int
) -> None:
    found = two_ranks[0]["trajectories"]
    losses, expected = found[f"{precision}/{stage}/2"]["losses"], found[f"{precision}/1/2"]["losses"]
    assert len(losses) == STEPS
    assert losses[-1][0] < losses[0][0]
    assert_same_training(losses, expected, precision=precision)


def test_reductions_that_overlap_the_backward_pass_change_no_bit(two_ranks: list[dict[str, Any]]) -> None:
    assert len(two_ranks[0]["overlapped"]) == 6 and all(two_ranks[0]["overlapped"].values())


@pytest.mark.parametrize(("precision", "micro"), list(itertools.product(PRECISIONS, (1, 2, 4))))
def test_world_size_and_micro_batch_do_not_change_the_training(
    two_ranks: list[dict[str, Any]], one_rank: dict[str, Any], precision: str, micro: int
) -> None:
    expected = two_ranks[0]["trajectories"][f"{precision}/1/2"]["losses"]
    assert_same_training(
        two_ranks[0]["trajectories"][f"{precision}/1/{micro}"]["losses"], expected, precision=precision
    )
    assert_same_training(one_rank[f"{precision}/1/{micro}"]["losses"], expected, precision=precision)


def test_every_rank_reports_the_same_numbers(two_ranks: list[dict[str, Any]]) -> None:
    for name, row in two_ranks[0]["trajectories"].items():
        other = two_ranks[1]["trajectories"][name]
        assert (row["losses"], row["digests"]) == (other["losses"], other["digests"])


def test_the_digest_and_the_metrics_are_of_the_global_batch(
    two_ranks: list[dict[str, Any]], one_rank: dict[str, Any]
) -> None:
    expected = [str(sum(example.digest for example in global_batch(step)) % (1 << 64)) for step in range(STEPS)]
    for row in [*two_ranks[0]["trajectories"].values(), *one_rank.values()]:
        assert row["digests"] == expected
        assert row["doubles"] == pytest.approx([2.0] * STEPS, rel=1e-12)


@per_engine
def test_what_one_rank_cannot_take_no_rank_takes(two_ranks: list[dict[str, Any]], precision: str, stage: int) -> None:
    for found in two_ranks:
        row = found["skips"][f"{precision}/{stage}"]
        assert row["skipped"] == [True, True], "a NaN loss, then an infinite gradient, on the last rank only"
        assert row["finite_loss"] == [False, True]
        assert row["untouched"], "weights, moments and EMA are as before"
        assert row["as_if_never"], "and later steps are those of a run that never saw the bad ones"
        assert row["updates"] == SAVED


@per_engine
def test_a_parameter_unused_in_a_step_has_no_gradient_in_it(
    two_ranks: list[dict[str, Any]], precision: str, stage: int
) -> None:
    found = two_ranks[0]["branches"]
    assert_same_training(found[f"{precision}/{stage}"], found[f"{precision}/1"], precision=precision)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_does_not_change_the_training(two_ranks: list[dict[str, Any]], stage: int) -> None:
    found = two_ranks[0]["offloaded"]
    assert len(found[f"{stage}/True"]) == 3 + 4, "one step of four was skipped, not those after it"
    assert_same_training(found[f"{stage}/True"], found[f"{stage}/False"], precision="bf16")


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_built() -> None:
    from scenarios import settings, tiny_dit

    config = settings(stage=1, precision="fp32").model_copy(update={"micro_batch": 3})
    with pytest.raises(ConfigError, match="Nearest"):
        Engine(tiny_dit(), train=config)


@per_engine
def test_a_step_beyond_a_limit_moves_nothing_at_any_stage_and_reports_its_norm(
    two_ranks: list[dict[str, Any]], precision: str, stage: int
) -> None:
    row = two_ranks[0]["spikes"][f"{precision}/{stage}"]
    assert row["skipped"] == [True, True, False] and row["untouched"]
    over_norm, over_loss, within = row["norms"]
    assert over_norm == over_loss == within > 1e-3
    assert row["norms"] == two_ranks[1]["spikes"][f"{precision}/{stage}"]["norms"]


@pytest.mark.parametrize("stage", STAGES)
def test_biases_and_norms_can_be_spared_from_weight_decay_as_in_plain_torch(
    two_ranks: list[dict[str, Any]], stage: int
) -> None:
    row = two_ranks[0]["decays"][str(stage)]
    assert row["restored_exact"] and row["groups"] == 2
    for name, (expected, apart) in _plain_torch_with_spared_decay().items():
        allowed = apart + summed(row["steps"], torch.float32) * expected.abs()
        assert ((row["masters"][name] - expected).abs() <= allowed).all(), name


def _plain_torch_with_spared_decay() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weights after four steps, and the largest change of each element by another order of summation."""
    dit = tiny_dit()
    matrices = [p for p in dit.parameters() if p.ndim > 1]
    others = [p for p in dit.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=2e-3)
    apart: dict[torch.Tensor, torch.Tensor] = {}
    for step in range(4):
        adam.param_groups[0]["lr"] = adam.param_groups[1]["lr"] = 2e-3 * (1 - step / 40)
        adam.zero_grad()
        losses = [Velocity().loss(dit, example)[0] for example in global_batch(step)]
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        adam.step()
        add_apart(apart, adam, terms=TOKENS)
    return {name: (parameter.detach(), apart[parameter]) for name, parameter in dit.named_parameters()}
