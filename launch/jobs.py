"""The jobs by name: which config each reads, and what one rank of it runs.

A job is data (`kind`, resolved config), so that it means the same in a local rank and on a cluster.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from flowmask.launch.config import CacheJob, EvaluateJob, TrainJob, load_job, validate
from flowmask.launch.local.processes import MISTAKE_EXIT_CODE, JobFailedError, run_local
from flowmask.models.errors import UserError
from flowmask.models.files import write_atomically
from flowmask.trainer.state.owner import note_end

Resolved = dict[str, Any]
KINDS: dict[str, type[CacheJob] | type[TrainJob] | type[EvaluateJob]] = {
    "cache": CacheJob,
    "train": TrainJob,
    "evaluate": EvaluateJob,
}


def start(kind: str, config: Path, overrides: Sequence[str] = (), *, wait: bool = True) -> int:
    """Read the config of a job and run it where `launch.cluster` says; returns the exit code."""
    return run(kind, load_job(config, KINDS[kind], overrides), wait=wait)


def run(kind: str, job: CacheJob | TrainJob | EvaluateJob, *, wait: bool = True) -> int:
    """Run a job, one process a rank; returns 0, or the exit code that asks for a requeue.

    wait: on a cluster, until it is done; a job on this machine is always waited for.
    """
    resolved = job.model_dump(mode="json")
    if job.launch.cluster == "slurm":
        from flowmask.launch.slurm.submit import to_slurm

        return to_slurm(kind, job, wait=wait)
    try:
        code = (
            run_rank(kind, resolved)
            if job.launch.cluster == "debug"
            else run_local(kind, resolved, processes=job.launch.processes_per_node)
        )
    except JobFailedError as error:
        last = error.traceback.strip().splitlines()[-1:]
        note_end(job.out, code=1, message=": ".join([error.what, *last]))
        raise
    except UserError as error:
        note_end(job.out, code=MISTAKE_EXIT_CODE, message=str(error))
        raise
    note_end(job.out, code=code)
    return code


def run_rank(kind: str, resolved: Resolved) -> int:
    """Run one rank of a job in this process; ConfigError where its GPU is missing or has too little memory."""
    from flowmask.models.device import gpu_holds, require_gpu

    asked = {"cache": resolved.get("cache", {}).get("device"), "evaluate": resolved.get("device")}.get(kind)
    if (promised := resolved["launch"]["gpus_per_node"]) and asked != "cpu":
        require_gpu(f"launch.gpus_per_node is {promised}", otherwise="set launch.gpus_per_node=0")
    with gpu_holds(f"this {kind} job", fix=_LESS_MEMORY[kind]):
        return RANK[kind](resolved)


def save_config(folder: Path, resolved: Resolved) -> None:
    """Write `folder/config.yaml`, with which the same command repeats the job."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    write_atomically(folder / "config.yaml", text)


def _strip(resolved: Resolved) -> Resolved:
    """The part of a job's config that its room knows."""
    return {key: value for key, value in resolved.items() if key != "launch"}


def _rank() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _cache(resolved: Resolved) -> int:
    from flowmask.data_pipeline.build.build import build
    from flowmask.data_pipeline.config import CacheBuildConfig
    from flowmask.launch.progress import cache_progress

    config = validate(_strip(resolved), CacheBuildConfig, origin="cache job")
    rank, world = _rank()
    with cache_progress(config.out, show=rank == 0) as on_progress:
        build(config, worker=rank, workers=world, on_progress=on_progress)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # on every node: the first one may have died
        save_config(config.out, resolved)
    return 0


def _train(resolved: Resolved) -> int:
    from flowmask.trainer.config import RunConfig
    from flowmask.trainer.run.train import run as train

    return train(validate(resolved, RunConfig, origin="train job"))


def _evaluate(resolved: Resolved) -> int:
    from flowmask.launch.progress import bar, show_scores
    from flowmask.trainer.score.evaluate import evaluate
    from flowmask.trainer.score.evaluate_config import EvaluateConfig

    config = validate(_strip(resolved), EvaluateConfig, origin="evaluate job")
    rank, world = _rank()
    with bar(show=rank == 0) as on_progress:
        scores = evaluate(config, rank=rank, world=world, on_progress=on_progress)
    if scores is not None:  # whoever finishes last has them
        save_config(config.out, resolved)
        show_scores(scores, config.out)
    return 0


_LESS_MEMORY = {  # what to do where the GPU is too small
    "cache": "lower cache.batch_clips, or choose cache.encoder_dtype=bfloat16",
    "train": "lower train.micro_batch, or choose what `flowmask plan` says fits",
    "evaluate": "lower sentences_per_batch or the box, or choose precision=bf16",
}
RANK: dict[str, Callable[[Resolved], int]] = {"cache": _cache, "train": _train, "evaluate": _evaluate}
