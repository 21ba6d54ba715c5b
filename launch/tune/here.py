"""This machine: a job's share on it, its GPUs and memory, and the settings that fit by `flowmask plan`'s estimates."""

import os
from dataclasses import dataclass
from typing import get_args

import psutil

from flowmask.launch.check.ask import ask
from flowmask.launch.jobs import TrainJob
from flowmask.launch.jobs.job import Job
from flowmask.models.config import TrainAttention
from flowmask.models.errors import ConfigError

# In another process, as in launch/check/attention.py: this process would otherwise hold GPU memory.
_ASK_GPU = """
import json, torch
from flowmask.models.dit import require_attention
from flowmask.models.errors import UserError
device, kernels = torch.device("cuda", 0), []
for name in {names!r}:
    try:
        require_attention(name, key="train.attention", device=device)
        kernels.append(name)
    except UserError:
        pass
print(json.dumps([torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0], kernels]))
"""


@dataclass(frozen=True)
class Hardware:
    """name: GPU model, or CPU with its cores; memory_bytes: free memory for a process; attention: supported kernels."""

    name: str
    memory_bytes: float
    attention: tuple[str, ...] = ("native",)


def hardware(job: Job) -> Hardware:
    """The hardware of one process of a job. Raises ConfigError if a GPU does not answer."""
    import torch

    if job.computes_on == "cpu" or not torch.cuda.is_available():
        memory = psutil.virtual_memory().available / processes(job)
        return Hardware(f"CPU, {len(os.sched_getaffinity(0))} cores", memory)
    facts, problem = ask(_ASK_GPU.format(names=get_args(TrainAttention)))
    if problem:
        raise ConfigError(f"the GPU does not answer: {problem}; see `flowmask doctor`")
    return Hardware(facts[0], facts[1], tuple(facts[2]))


def processes(job: Job) -> int:
    """Number of the job's processes on one machine."""
    return 1 if job.launch.cluster == "debug" else job.launch.processes_per_node


def on_this_machine(job: Job) -> Job:
    """One node's part of a job, run here: a training gets its share of the global batch in as many micro-batches."""
    ranks = processes(job)
    place = {"cluster": "local", "nodes": 1, "array": 1, "processes_per_node": ranks}
    changes: dict[str, object] = {"launch": job.launch.model_copy(update=place)}
    if isinstance(job, TrainJob):
        share = job.train.global_batch * ranks // job.launch.world_size
        changes["train"] = job.train.model_copy(update={"global_batch": share})
    return job.model_copy(update=changes)


class Room:
    """The memory of one process, and the estimates of `flowmask plan` for jobs. Cache builds are assumed to fit."""

    def __init__(self, given: Job, limit_bytes: float) -> None:
        from flowmask.launch.plan.settings import Settings

        self._limit = limit_bytes
        self._settings = Settings(given) if isinstance(given, TrainJob) else None

    def refuses(self, job: Job) -> str:
        """Why a job can't fit; empty if it may fit."""
        needs = self._needs(job)
        return "" if needs < self._limit else f"needs {needs / 1e9:.3g} GB, at most {self._limit / 1e9:.3g} GB fit"

    def is_too_small_for(self, job: Job) -> None:
        """Record that this job did not fit: a job that needs at least as much memory will not fit either."""
        self._limit = min(self._limit, self._needs(job))

    def _needs(self, job: Job) -> float:
        if self._settings is None:
            return 0.0
        here = on_this_machine(job)
        assert isinstance(here, TrainJob)
        return self._settings.of(here).device.peak
