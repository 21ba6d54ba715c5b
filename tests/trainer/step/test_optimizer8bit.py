"""Moments in 8 bits: the training stays close to AdamW, a skip changes no byte, a resume is exact."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from runs import SignalAt, losses, start
from scenarios import Training, Velocity, micro_batches, settings, tiny_dit
from workers import run_ranks

from flowmask.models.errors import ConfigError
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.trainer import distributed
from flowmask.trainer.step import zero
from flowmask.trainer.step.engine import Engine
from flowmask.trainer.step.optimizer8bit import BLOCK, code_table, encode
from flowmask.trainer.train_config import TrainConfig

EIGHT = {"optimizer": "adamw8bit"}
STAGES = (0, 1, 2, 3)


def training(stage: int = 0, precision: str = "fp32", *, folder: Path | None = None, **change: Any) -> Training:
    return Training(stage=stage, precision=precision, folder=folder, change=EIGHT | change)


def encoded(trained: Training) -> dict[str, torch.Tensor]:
    """All bytes of this rank's masters and encoded moments."""
    optimizer = trained.engine._optimizer
    found = {}
    for number, (master, state) in enumerate(optimizer.state.items()):
        found[f"{number}|master"] = master.detach().clone()
        found |= {f"{number}|{kind}": torch.as_tensor(value).clone() for kind, value in state.items()}
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("signed", [True, False])
def test_encoded_blocks_survive_being_decoded_and_encoded(signed: bool) -> None:
    table = code_table(signed=signed, device=torch.device("cpu"))
    values = torch.randn(100 * BLOCK + 17, generator=torch.Generator().manual_seed(0)) ** 3 * 1e-4
    values[5 * BLOCK : 6 * BLOCK] = 0
    values = values if signed else values.square()
    codes, scales = encode(values, table)
    decoded = torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, table, BLOCK, torch.float32)
    again, scales_again = encode(decoded, table)
    assert torch.equal(codes, again) and torch.equal(scales, scales_again)
    assert (decoded - values).abs().max() <= 0.04 * values.abs().max()


def test_the_first_step_is_adamws_with_its_clipping_and_its_decay() -> None:
    change = {"weight_decay": 0.5, "weight_decay_exclude": "norms_biases", "grad_clip": 0.1}
    ends = []
    for trained in (training(**change), Training(stage=0, precision="fp32", change=change)):
        trained.run(range(1))
        ends.append(trained.engine.full_state_dict())
        trained.engine.close()
    for name, expected in ends[1].items():
        torch.testing.assert_close(ends[0][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_stay_within_two_percent_of_adamws(precision: str) -> None:
    found = []
    for trained in (training(precision=precision), Training(stage=0, precision=precision)):
        found.append([result.loss for result in trained.run(range(20))])
        trained.engine.close()
    assert found[0] == pytest.approx(found[1], rel=0.02) and found[0] != found[1]
    assert found[0][-1] < found[0][0]


def test_moments_take_a_quarter_of_their_memory() -> None:
    trained = training()
    state = trained.engine._optimizer.state
    held = sum(value.nbytes for row in state.values() for value in row.values() if torch.is_tensor(value))
    elements = sum(master.numel() for master in state)
    assert 2 * elements < held <= (2 + 8 / BLOCK) * elements + 16
    trained.engine.close()


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)


def test_without_bitsandbytes_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch)
    config = settings(stage=0, precision="fp32")
    with pytest.raises(ConfigError, match=r"pip install 'flowmask\[gpu\]'") as caught:
        Engine(tiny_dit(), train=config.model_copy(update=EIGHT))
    assert "\n" not in str(caught.value)
    Engine(tiny_dit(), train=config).close()


def test_it_cannot_be_offloaded() -> None:
    with pytest.raises(ValidationError, match="choose one of the two"):
        TrainConfig(steps=1, global_batch=1, offload_optimizer=True, optimizer="adamw8bit")


def test_a_run_that_was_stopped_ends_with_the_losses_of_one_that_never_was(lab: Path, tmp_path: Path) -> None:
    overrides = {"train.optimizer": "adamw8bit", "train.steps": 7}
    assert start(lab, tmp_path / "never", overrides) == 0
    with SignalAt.on_every_run():
        assert start(lab, tmp_path / "stopped", overrides) == REQUEUE_EXIT_CODE
    assert start(lab, tmp_path / "stopped", overrides) == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "never")


def skipped_and_resumed(*, folder: str) -> dict[str, Any]:
    """The state after skips and after a resume, at every ZeRO stage and precision."""
    distributed.init(timeout_s=60)
    zero._PERSISTENT_ELEMENTS = 600  # ZeRO 3 then has both kinds of parameters
    found = {}
    for precision, stage in [("fp32", stage) for stage in STAGES] + [("bf16", stage) for stage in STAGES]:
        trained = training(stage, precision, folder=Path(folder) / f"{precision}_{stage}")
        trained.run(range(4))
        before = encoded(trained)
        bad = micro_batches(4, micro=2)
        if distributed.rank() == distributed.world_size() - 1:
            bad[0].latents.fill_(torch.nan)
        skips = [trained.engine.step(Velocity(), bad)]
        skips += [trained.engine.step(Velocity(), micro_batches(4, micro=2), grad_norm_limit=1e-3)]
        untouched = all(skip.skipped for skip in skips) and same(before, encoded(trained))
        trained.save(4)
        saved = trained.everything()
        never = [result.loss for result in trained.run(range(4, 7))]
        end = trained.everything()
        moved = encoded(trained)
        trained.engine.close()
        again = training(stage, precision, folder=trained.checkpoints.folder)
        again.restore()
        restored = same(saved, again.everything())
        losses_again = [result.loss for result in again.run(range(4, 7))]
        found[f"{precision}/{stage}"] = {
            "untouched": untouched,
            "moved": not same(before, moved),
            "restored": restored,
            "continued": losses_again == never and same(end, again.everything()),
            "losses": never,
        }
        again.engine.close()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two ranks' checkpoints, and their results."""
    where = tmp_path_factory.mktemp("eight_bits")
    arguments = {"folder": str(where / "saved")}
    found = run_ranks(2, Path(__file__), "skipped_and_resumed", folder=where, arguments=arguments)
    return where / "saved", found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skip_moves_no_byte_and_a_resume_is_exact_on_two_ranks(
    ranks: tuple[Path, list[dict[str, Any]]], stage: int, precision: str
) -> None:
    for found in ranks[1]:
        row = found[f"{precision}/{stage}"]
        assert {key: row[key] for key in ("untouched", "moved", "restored", "continued")} == {
            "untouched": True,
            "moved": True,
            "restored": True,
            "continued": True,
        }
        assert row["losses"] == pytest.approx(ranks[1][0][f"{precision}/0"]["losses"], rel=0.02)


@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_goes_on_from_the_checkpoint_of_two_but_not_to_the_bit(
    ranks: tuple[Path, list[dict[str, Any]]], stage: int
) -> None:
    alone = training(stage, folder=ranks[0] / f"fp32_{stage}")
    assert alone.restore()["step"] == 4
    found = [result.loss for result in alone.run(range(4, 7))]
    alone.engine.close()
    assert found == pytest.approx(ranks[1][0][f"fp32/{stage}"]["losses"], rel=0.01)
