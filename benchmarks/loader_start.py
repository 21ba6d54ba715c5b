"""From opening a cache to the first batch: seconds and private memory, as one JSON line. Called by loader.py.

Imports and the objective come before, and are not counted. `uss_mb` is the growth of this process's private memory
(USS), with the first batch and those read ahead (one example each). `uss_absolute_mb` is all of it, with Python,
torch and DeepSpeed.
"""

import json
import sys
from pathlib import Path
from time import perf_counter

import psutil

import flowmask.trainer.run.train  # noqa: F401  (everything that a training process imports)
from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read.epoch_plan import EpochPlan
from flowmask.data_pipeline.read.loader import Loader
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.models.config import ModelConfig
from flowmask.models.vae import LatentStats
from flowmask.trainer.objectives import objective_named, section


def main() -> None:
    config = LoaderConfig(cache=Path(sys.argv[1]))
    stats = LatentStats(mean=(0.0,) * 16, std=(1.0,) * 16)
    objective = objective_named(section(), model=ModelConfig(wan=Path()), stats=stats)
    process = psutil.Process()
    before, started = process.memory_full_info().uss, perf_counter()
    reader = CacheReader(config.cache)
    opened = perf_counter() - started
    plan = EpochPlan(reader.buckets, global_batch=1, seed=1, remainder=config.remainder)
    loader = Loader(
        reader,
        plan,
        rank=0,
        world_size=1,
        micro_batch=1,
        needs=objective.needs,
        text_tokens=256,
        prepare=objective.prepare,
        threads=config.threads,
        prefetch_batches=config.prefetch_batches,
    )
    with loader:
        (batch,) = next(loader)
        seconds, after = perf_counter() - started, process.memory_full_info().uss
    assert batch.video_mean is not None
    figures = {
        "startup_s": round(seconds, 3),
        "startup_open_s": round(opened, 3),
        "uss_mb": round((after - before) / 1e6, 1),
        "uss_absolute_mb": round(after / 1e6, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
