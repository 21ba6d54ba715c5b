"""A step reads numbers from its device once, after all of its work is queued; on a GPU each such read is a wait."""

from collections import Counter

import pytest
from host_waits import Questions, Scalars
from scenarios import SteepVelocity, Velocity, micro_batches, settings, tiny_dit

from flowmask.trainer.step.ema import ShardedEma
from flowmask.trainer.step.engine import Engine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", [Velocity, SteepVelocity], ids=["taken", "skipped"])
def test_a_step_of_several_micro_batches_waits_for_its_device_once(objective: type[Velocity], precision: str) -> None:
    engine = Engine(tiny_dit(), train=settings(stage=1, precision=precision))
    ema = ShardedEma(engine, decay=0.9)
    batches = micro_batches(0, micro=2)
    engine.step(Velocity(), batches)
    with Scalars() as scalars, Questions() as questions:
        result = engine.step(objective(), batches, loss_limit=1e9, grad_norm_limit=1e9)
        ema.update()
    assert len(batches) > 1 and result.skipped is (objective is SteepVelocity)
    assert +questions.seen == Counter(tolist=1)
    assert scalars.seen == 0
    engine.close()
