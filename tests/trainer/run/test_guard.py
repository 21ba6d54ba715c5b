"""Spikes are judged against recent steps, robustly, before the optimizer moves, and equally on every rank."""

import json
import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from runs import SignalAt, losses, rows, start

from flowmask.models.errors import TrainingError
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.trainer.config import GuardConfig
from flowmask.trainer.predict.weights import content_sha256
from flowmask.trainer.run.guard import SpikeGuard, spike_limit
from flowmask.trainer.state.checkpoint import read_full, read_state
from flowmask.trainer.state.steps import complete

QUICK = {"guard.judge_after_steps": 4, "guard.window_steps": 8, "train.micro_batch": 4}


def fed(guard: SpikeGuard, norms: list[float]) -> SpikeGuard:
    for norm in norms:
        guard.took(loss=1.0, grad_norm=norm)
    return guard


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.02, 0.3, 0.8])
def test_the_default_takes_ordinary_noise_and_skips_what_is_far_beyond_it(seed: int, spread: float) -> None:
    draw = random.Random(seed)
    guard = SpikeGuard(GuardConfig())
    for step in range(5000):
        norm = math.exp(draw.gauss(-step / 2000, spread))  # falls slowly, as in a training
        assert norm <= guard.grad_norm_limit
        fed(guard, [norm])
    assert guard.grad_norm_limit < 100 * math.exp(10 * spread)
    assert guard.loss_limit == math.inf


def test_one_spike_among_the_past_hardly_moves_the_limit() -> None:
    past = [1.0 + 0.01 * i for i in range(50)]
    assert spike_limit([*past, 1e9], deviations=10) == pytest.approx(spike_limit(past, deviations=10), rel=0.1)


def test_nothing_is_a_spike_before_there_is_a_past_or_when_switched_off() -> None:
    config = GuardConfig(judge_after_steps=3, window_steps=5)
    assert fed(SpikeGuard(config), [1.0, 1.0]).grad_norm_limit == math.inf
    assert fed(SpikeGuard(config), [1.0] * 3).grad_norm_limit == pytest.approx(math.e)
    off = config.model_copy(update={"grad_norm_spike": None})
    assert fed(SpikeGuard(off), [1.0] * 9).grad_norm_limit == math.inf
    assert fed(SpikeGuard(config), [0.0] * 3).grad_norm_limit >= 0.0


def test_its_state_survives_json_to_the_bit() -> None:
    guard = fed(SpikeGuard(GuardConfig(judge_after_steps=2)), [0.1 + 0.7 * i for i in range(300)])
    again = SpikeGuard(GuardConfig(judge_after_steps=2), state=json.loads(json.dumps(guard.state())))
    assert again.grad_norm_limit == guard.grad_norm_limit and again.state() == guard.state()


class SteepAt(SignalAt):
    """An objective whose loss, and so its gradient, is a million times too large in some steps."""

    steps: ClassVar[tuple[int, ...]] = (6,)

    @classmethod
    @contextmanager
    def on(cls, *steps: int) -> Iterator[None]:
        cls.steps = steps
        with cls.on_every_run():
            yield

    def loss(self, module: Any, batch: Any) -> Any:
        loss, metrics = self.inner.loss(module, batch)
        return (loss * 1e6 if batch.step in self.steps else loss), metrics


def test_a_spike_is_skipped_named_and_leaves_the_weights_as_they_were(lab: Path, tmp_path: Path) -> None:
    often = {"checkpoint.every_steps": 1, "checkpoint.keep_last": 10}
    with SteepAt.on(6):
        assert start(lab, tmp_path / "run", QUICK | often) == 0
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if row.get("skipped")] == [7]
    assert found[6]["grad_norm"] > 1e4 * found[5]["grad_norm"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(
        r"step 7 skipped: gradient norm spike; loss .*gradient norm \S+ \(limit \S+\).*examples \d+, \d+", log
    )
    saved = {read_state(path)["step"]: path for path in complete(tmp_path / "run" / "checkpoints")}
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        before, after = (content_sha256(read_full(saved[step], kind=kind)) for step in (6, 7))
        assert before == after


def test_the_guard_remembers_over_a_stop_what_it_would_have_known_without_one(lab: Path, tmp_path: Path) -> None:
    with SteepAt.on(6):
        assert start(lab, tmp_path / "never", QUICK) == 0
    with SignalAt.on_every_run():
        assert start(lab, tmp_path / "run", QUICK) == REQUEUE_EXIT_CODE
    with SteepAt.on(6):
        assert start(lab, tmp_path / "run", QUICK) == 0
    assert losses(tmp_path / "run", skipped=[7]) == losses(tmp_path / "never", skipped=[7])
    states = [read_state(complete(tmp_path / n / "checkpoints")[0])["state"] for n in ("run", "never")]
    assert states[0]["guard"] == states[1]["guard"] and states[0]["skips"] == states[1]["skips"] == {
        "gradient norm spike": 1
    }


def test_too_many_spikes_in_a_row_stop_the_run_and_a_wider_limit_lets_it_go_on(lab: Path, tmp_path: Path) -> None:
    patience = QUICK | {"guard.max_consecutive_skips": 2}
    with (
        SteepAt.on(*range(6, 100)),
        pytest.raises(TrainingError, match=r"2 gradient norm spike; the last 2 .*lower train\.lr"),
    ):
        start(lab, tmp_path / "run", patience)
    with SteepAt.on(*range(6, 100)):
        assert start(lab, tmp_path / "run", patience | {"guard.grad_norm_spike": None}) == 0
