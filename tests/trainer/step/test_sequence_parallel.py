"""Splitting an example's tokens over ranks moves the work, but does not change the training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_stand_in import FlashLike, gradients_of
from diffusers.models import attention_dispatch
from runs import losses, rows, start
from scenarios import tiny_dit
from tolerance import summed
from torch import Tensor
from workers import run_ranks

from flowmask.data_pipeline.cache.manifest import BucketEntry
from flowmask.models.dit import KERNELS
from flowmask.models.errors import ConfigError
from flowmask.trainer import distributed
from flowmask.trainer.state.checkpoint import read_full
from flowmask.trainer.step.sequence_parallel import refuse_uneven, split_tokens
from flowmask.trainer.train_config import TrainConfig, accumulation_steps, workers

STEPS = 10
CLIPS = BucketEntry(frames=5, height=48, width=80, first=[0], examples=[1])  # 2 x 3 x 5 = 30 tokens
EVALUATE = {
    "evaluate.every_steps": 5,
    "evaluate.examples": 3,
    "evaluate.jf_examples": 0,
    "evaluate.timesteps": (1000, 1),
}
SPLIT = {"train.sequence_parallel": 2, "train.micro_batch": 2}
CHANGES = {  # compared with the run of one process
    "zero_1": SPLIT | {"train.zero_stage": 1},
    "zero_3": SPLIT | {"train.zero_stage": 3},
    "recomputed": SPLIT | {"train.zero_stage": 2, "train.activation_checkpointing": "full"},
    "lora": SPLIT | {"train.zero_stage": 0, "lora": {"rank": 4}},
}
AT_LENGTH = CHANGES | {
    "zero_0": SPLIT | {"train.zero_stage": 0},
    "zero_2": SPLIT | {"train.zero_stage": 2},
    "selective": SPLIT | {"train.zero_stage": 2, "train.activation_checkpointing": "selective"},
    "one_each": SPLIT | {"train.micro_batch": 1},
    "bf16": SPLIT | {"train.zero_stage": 2, "train.precision": "bf16"},
}
OTHERS = ("bf16", "lora")  # these have a separate reference run of one process
SAME = [name for name in AT_LENGTH if name not in OTHERS]


def overrides(**changes: Any) -> dict[str, Any]:
    return {
        "train.precision": "fp32",
        "train.global_batch": 4,
        "train.steps": STEPS,
        "checkpoint.every_steps": 100,
        **EVALUATE,
        **changes,
    }


def trainings(lab: str, folder: str, names: list[str]) -> dict[str, Any]:
    """Run by every rank: its part of a split DiT, the named trainings, and one with another split at each start."""
    found = seen_by_a_rank()
    for name in names:
        start(Path(lab), Path(folder) / name, overrides(**AT_LENGTH[name]))
    for steps, ranks in ((4, 2), (7, 1), (STEPS, 2)):
        changes = {"train.sequence_parallel": ranks, "train.steps": steps}
        changes |= {"train.micro_batch": 1, "train.zero_stage": 3}
        start(Path(lab), Path(folder) / "elastic", overrides(**changes))
    return found


def seen_by_a_rank() -> dict[str, Any]:
    """Tokens in a block, the whole output, and the gradients of a loss, summed over a group of two."""
    distributed.init()
    dit = tiny_dit()
    tokens: list[int] = []
    dit.blocks[1].attn1.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append((args or tuple(kwargs.values()))[0].shape[1]), with_kwargs=True
    )
    split_tokens(dit, ranks=2)
    output = asked(dit)
    output.square().mean().backward()
    gradients = {name: distributed.all_reduce_sum(p.grad) for name, p in dit.named_parameters()}
    groups = distributed.world_size() // 2
    seen = {"tokens": tokens, "output": output.detach(), "gradients": {n: g / groups for n, g in gradients.items()}}
    return seen | {"flash": flash_of_a_rank()}


def flash_of_a_rank() -> dict[str, Any]:
    """Output and summed gradients of a split DiT with flash-attn's kernels, and the shapes that the kernels got."""
    dit, shapes = tiny_dit(), []

    def forward(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, *options: Any) -> tuple[Tensor, ...]:
        shapes.append(tuple(q.shape))
        assert scale == q.shape[-1] ** -0.5 and not dropout
        out = FlashLike.apply(q, k, v)
        return out, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), q.new_empty(0), q.new_empty(2)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *into: Any) -> Tensor:
        for place, found in zip(into[:3], gradients_of(grad, q, k, v), strict=True):
            place.copy_(found)
        return lse

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention_dispatch, "_wrapped_flash_attn_forward", forward)
        patched.setattr(attention_dispatch, "_wrapped_flash_attn_backward", backward)
        whole = lambda q, k, v, **options: FlashLike.apply(q, k, v)  # noqa: E731 - of text, which is not split
        patched.setattr(attention_dispatch, "flash_attn_func", whole)
        for block in dit.blocks:
            for part in (block.attn1, block.attn2):
                part.processor._attention_backend = KERNELS["flash"].backend
        split_tokens(dit, ranks=2)
        output = asked(dit)
        output.square().mean().backward()
    gradients = {name: distributed.all_reduce_sum(p.grad) for name, p in dit.named_parameters()}
    groups = distributed.world_size() // 2
    return {"shapes": shapes, "output": output.detach(), "gradients": {n: g / groups for n, g in gradients.items()}}


def asked(dit: Any) -> Tensor:
    """The output of a DiT for two examples of 8 tokens that are the same on every rank."""
    draws = torch.Generator().manual_seed(3)
    output: Tensor = dit(
        hidden_states=torch.randn(2, 8, 2, 4, 4, generator=draws),
        timestep=torch.tensor([1000, 400]),
        encoder_hidden_states=torch.randn(2, 6, 16, generator=draws),
        return_dict=False,
    )[0]
    return output


@pytest.fixture(scope="module")
def alone(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, with which the others are compared."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("alone") / "run"
    start(lab, out, overrides(**{"train.micro_batch": 2}))
    return out


@pytest.fixture(scope="module")
def others_alone(lab: Path, alone: Path) -> Path:
    """The folder of the runs of one process in another precision, and with adapters."""
    for name in OTHERS:
        start(lab, alone.parent / name, overrides(**AT_LENGTH[name] | {"train.sequence_parallel": 1}))
    return alone.parent


@pytest.fixture(scope="module")
def split(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of all trainings of two ranks in one group, and the results of each rank."""
    folder = tmp_path_factory.mktemp("split")
    return folder, run_group_of(2, lab, folder, list(CHANGES))


def run_group_of(ranks: int, lab: Path, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    arguments = {"lab": str(lab), "folder": str(folder), "names": names}
    return run_ranks(ranks, Path(__file__), "trainings", folder=folder / "logs", timeout_s=1200, arguments=arguments)


def assert_same_training(out: Path, alone: Path) -> None:
    assert [row["batch"] for row in rows(out)] == [row["batch"] for row in rows(alone)]
    assert len(losses(alone)) == STEPS and losses(out) == pytest.approx(losses(alone), rel=1e-5)
    norms, expected = ([row["grad_norm"] for row in rows(folder)] for folder in (out, alone))
    assert norms == pytest.approx(expected, rel=1e-5)
    for kind in ("master", "ema"):
        weights, reference = (read_full(folder / "checkpoints" / "latest", kind=kind) for folder in (out, alone))
        assert weights.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-5, msg=f"{kind} {name}")
    measured, expected_ones = evaluations(out), evaluations(alone)
    assert len(measured) == STEPS // 5
    for found, wanted in zip(measured, expected_ones, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def evaluations(out: Path) -> list[dict[str, float]]:
    lines = (out / "evaluations.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k.startswith("eval_")} for line in lines]


@pytest.mark.parametrize("name", [name for name in CHANGES if name in SAME])
def test_ten_steps_of_a_group_are_those_of_one_process(
    alone: Path, split: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    assert_same_training(split[0] / name, alone)


def test_so_are_those_of_adapters(others_alone: Path, split: tuple[Path, list[dict[str, Any]]]) -> None:
    assert_same_training(split[0] / "lora", others_alone / "lora")


def test_a_run_goes_on_with_its_tokens_split_over_another_number_of_ranks(
    alone: Path, split: tuple[Path, list[dict[str, Any]]]
) -> None:
    out = split[0] / "elastic"
    log = (out / "log.txt").read_text()
    assert "1 group of 2 processes x micro-batch 1 x 4" in log and ", 2 processes x micro-batch 1 x 2" in log
    assert "continuing from step_00000004" in log and "continuing from step_00000007" in log
    assert_same_training(out, alone)


def test_each_rank_computes_its_share_of_the_tokens_and_the_sum_of_gradients_is_the_whole_one(
    split: tuple[Path, list[dict[str, Any]]],
) -> None:
    whole = tiny_dit()
    output = asked(whole)
    output.square().mean().backward()
    largest = max(float(p.grad.abs().max()) for p in whole.parameters())
    allowed = summed(2 * 8, torch.float32, largest)  # a sum over the tokens of both examples
    for seen in [found for rank in split[1] for found in (rank, rank["flash"])]:
        if "tokens" in seen:
            assert seen["tokens"] == [4]  # of 8
        else:
            assert seen["shapes"] == [(2, 8, 1, 12)] * 2  # all tokens of one of the two heads, in both layers
        torch.testing.assert_close(seen["output"], output.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(seen["gradients"][name], parameter.grad, rtol=0, atol=allowed)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_so_are_those_of_one_and_of_two_groups_at_every_stage_and_in_bf16_but_for_rounding(
    lab: Path, alone: Path, others_alone: Path, tmp_path: Path, ranks: int
) -> None:
    run_group_of(ranks, lab, tmp_path, list(AT_LENGTH))
    for name in [*SAME, "elastic"]:
        assert {row["world_size"] for row in rows(tmp_path / name)} == {ranks}
        assert_same_training(tmp_path / name, alone)
    assert_same_training(tmp_path / "lora", others_alone / "lora")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(others_alone / "bf16"), rel=5e-3)


def config(**train: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 1, "global_batch": 12, "micro_batch": 2} | train)


def test_ranks_that_share_an_example_count_as_one() -> None:
    assert [accumulation_steps(config(sequence_parallel=2), world) for world in (2, 4, 12)] == [6, 3, 1]
    assert workers(config(sequence_parallel=2), 2) == "1 group of 2 processes"
    assert workers(config(sequence_parallel=2), 6) == "3 groups of 2 processes"
    with pytest.raises(ConfigError, match=r"sequence_parallel is 4; .* number of processes, 6: 1, 2, 3, 6$"):
        accumulation_steps(config(sequence_parallel=4), 6)
    with pytest.raises(ConfigError, match=r"2 x 4 groups of 3 processes = 8\. Nearest: 8 or 16"):
        accumulation_steps(config(sequence_parallel=3), 12)


def test_what_cannot_be_shared_evenly_is_refused_with_the_numbers_and_the_fix() -> None:
    def refuse(ranks: int, *buckets: BucketEntry) -> None:
        refuse_uneven(tiny_dit().config, ranks=ranks, buckets=buckets)  # 2 heads

    refuse(2, CLIPS)
    with pytest.raises(ConfigError, match=r"is 3; the DiT's 2 heads .* set train.sequence_parallel to one of 1, 2"):
        refuse(3, CLIPS)
    odd = CLIPS.model_copy(update={"frames": 1, "height": 48, "width": 80})
    with pytest.raises(ConfigError, match=r"is 2; the 15 tokens of clips 1x48x80 .* one of 1, or build"):
        refuse(2, CLIPS, odd)
