"""One rank of test_plan_memory.py: trains a tiny DiT with the real engine and measures its memory."""

import gc
from pathlib import Path
from typing import Any

import torch

LATENT = (2, 8, 8)
BUCKET = 20_000


def job_of(wan: Path, changes: dict[str, Any]) -> Any:
    """A run of two micro-batches a step and rank."""
    from flowmask.launch.jobs import TrainJob

    ranks = 2 // changes.get("sequence_parallel", 1)
    train = {"steps": 2, "global_batch": 2 * ranks, **changes}
    return TrainJob.model_validate(
        {
            "out": "unused",
            "model": {"wan": wan, "text_tokens": 16},
            "data": {"cache": "unused"},
            "train": train,
            "launch": {"processes_per_node": 2},
        }
    )


def measure(wan: str, cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """For each case: bytes of live tensors between two steps, the peak in a step, and the peak at the start."""
    from flowmask.trainer.step import zero

    zero._BUCKET_ELEMENTS = BUCKET  # the ratio to the tiny DiT is that of the real bucket to the real DiT
    configure = zero.config

    def with_small_prefetch(*args: Any, **keys: Any) -> dict[str, Any]:
        config = configure(*args, **keys)
        config.get("zero_optimization", {})["stage3_prefetch_bucket_size"] = BUCKET
        return config

    zero.config = with_small_prefetch
    return [_measure(job_of(Path(wan), case)) for case in cases]


def _measure(job: Any) -> dict[str, int]:
    from flowmask.launch.plan.model import architecture, objective_of, trained_module
    from flowmask.models.cost.dry_run import materialise
    from flowmask.models.cost.live_memory import LiveMemory
    from flowmask.trainer.step.ema import ShardedEma
    from flowmask.trainer.step.engine import Engine
    from flowmask.trainer.step.sequence_parallel import split_tokens

    shapes, objective = architecture(job.model.wan), objective_of(job)
    module = trained_module(job, shapes)
    gc.collect()
    with LiveMemory() as memory:
        materialise(module, torch.float32)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for buffer in module.buffers():
            buffer.zero_()
        if (kind := job.train.activation_checkpointing) != "none":
            objective.recompute(module, kind)
        split_tokens(module, ranks=job.train.sequence_parallel)
        engine = Engine(module, train=job.train)
        start = memory.peak_bytes
        ema = ShardedEma(engine, decay=0.9)
        for _ in range(2):
            gc.collect()
            memory.restart_peak()
            batches = [
                objective.fake_batch(LATENT, examples=job.train.micro_batch, text_dim=64)
                for _ in range(engine.accumulation)
            ]
            assert not engine.step(objective, batches).skipped
            ema.update()
            del batches
        peak = memory.peak_bytes
        gc.collect()
        held = memory.bytes
    engine.close()
    return {"held": held, "peak": peak, "start": start}
