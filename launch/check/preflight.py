"""What can be checked on the login node before a job waits in the queue: paths, fingerprints, disk, SLURM's limits.

A check passes, fails with its fix, or is unknown here with what it would need. Loads no weights and writes nothing.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from flowmask.data_pipeline.cache.manifest import BucketEntry
from flowmask.launch.config import CacheJob, EvaluateJob, LaunchConfig, TrainJob
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.models.errors import CacheError, CheckpointError, ConfigError
from flowmask.trainer.config import STATE_BYTES, accumulation_steps, workers
from flowmask.trainer.objectives import objective_class
from flowmask.trainer.state.checkpoint import newest, read_state
from flowmask.trainer.state.resume import fingerprint_of, refuse_other_cache, refuse_other_config
from flowmask.trainer.step.sequence_parallel import refuse_uneven

AnyJob = CacheJob | TrainJob | EvaluateJob
_CACHE_PARTS = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Check:
    """One question about a job, how it stands, and what was found."""

    what: str
    state: Literal["pass", "fail", "unknown"]
    found: str


def examine(job: AnyJob, script: str | None, asked: Sequence[Check] = ()) -> list[Check]:
    """Every check of a job. script: what sbatch would be given, None for a job that stays on this machine.

    asked: what `flowmask.launch.slurm.resources` found about the job's nodes.
    """
    found = [_out(job.out), *_inputs(job)]
    if isinstance(job, TrainJob):
        found += [_batch(job), *_tokens(job), *_resume(job), _disk(job)]
    if script is not None:
        found += _slurm(job.launch, script, asked)
    if isinstance(job, TrainJob) and all(check.state != "fail" for check in found):
        found.append(_deepspeed(job))
    return found


def refuse(checks: list[Check]) -> None:
    """ConfigError with the first failed check, in one line."""
    failed = [check for check in checks if check.state == "fail"]
    if failed:
        more = f" (and {len(failed) - 1} more: flowmask submit --dry-run)" if len(failed) > 1 else ""
        raise ConfigError(f"{failed[0].found}{more}")


def _out(out: Path) -> Check:
    folder = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return Check("out", "fail", f"out is {out}; {folder} can't be written: choose another")
    return Check("out", "pass", f"out: {out.resolve()} can be written")


def _inputs(job: AnyJob) -> Iterator[Check]:
    if isinstance(job, EvaluateJob):
        yield _path("checkpoint", Path(job.checkpoint), "a run, an export, or a FlowRVS .pth")
        yield _path("data.root", job.data.root, "the folder of the dataset")
        return
    parts = _CACHE_PARTS if isinstance(job, CacheJob) else objective_class(job.objective.kind).wan_parts
    yield _path("model.wan", job.model.wan, "the Wan2.1 folder in the diffusers layout")
    if job.model.wan.is_dir():
        for part in parts:
            yield _path("model.wan", job.model.wan / part, f"Wan2.1's {part}")
    if isinstance(job, CacheJob):
        for source in job.sources:
            yield _path("data.root", source.root, "the folder of the dataset")
        yield Check(
            "encoder weights", "unknown", "encoder weights: the build itself hashes them and refuses an `out` of others"
        )
        return
    if job.model.init is not None:
        yield _path("model.init", Path(job.model.init), "a run, an export, or a FlowRVS .pth")
    for cache in _caches(job):
        yield _path("data.cache", cache / "manifest.json", "a cache that `flowmask cache build` finished")


def _caches(job: TrainJob) -> list[Path]:
    """The caches of a run that are folders."""
    named: list[Any] = [entry.cache for entry in job.data.mix] or [job.data.cache]
    return [Path(cache) for cache in named if cache is not None and "://" not in str(cache)]


def _path(key: str, path: Path, what: str) -> Check:
    if path.exists():
        return Check(key, "pass", f"{key}: {path} is there")
    return Check(key, "fail", f"{key}: {path} does not exist; it must be {what}, visible from this node")


def _batch(job: TrainJob) -> Check:
    world, train = job.launch.world_size, job.train
    passes = accumulation_steps(train, world)
    said = f"{workers(train, world)} x micro-batch {train.micro_batch} x {passes} = global batch {train.global_batch}"
    return Check("batch", "pass", f"{said}; ZeRO {train.zero_stage}, {train.precision}")


def _deepspeed(job: TrainJob) -> Check:
    """The last, as importing DeepSpeed takes seconds: of a job that is fine so far."""
    from flowmask.trainer.step import zero

    try:
        version = zero.check(job.train, world=job.launch.world_size)
    except ConfigError as error:
        return Check("deepspeed", "fail", str(error))
    return Check("deepspeed", "pass", f"DeepSpeed {version} takes its config of this training")


def _tokens(job: TrainJob) -> Iterator[Check]:
    """Whether the processes that `train.sequence_parallel` names can share each clip's tokens."""
    ranks = job.train.sequence_parallel
    if ranks == 1:
        return
    try:
        shape = json.loads((job.model.wan / "transformer" / "config.json").read_text())
        caches = [json.loads((cache / "manifest.json").read_text()) for cache in _caches(job)]
        buckets = [BucketEntry.model_validate(bucket) for cache in caches for bucket in cache["buckets"]]
        refuse_uneven(shape, ranks=ranks, buckets=buckets)
    except ConfigError as error:
        yield Check("tokens", "fail", str(error))
        return
    except (OSError, ValueError, KeyError):
        return  # the paths are other checks'
    yield Check("tokens", "pass", f"train.sequence_parallel: {ranks} processes share each clip's tokens evenly")


def _resume(job: TrainJob) -> Iterator[Check]:
    """A run that goes on: the same settings and the same cache, as the job itself will ask."""
    try:
        checkpoint = newest(job.out)
        document = read_state(checkpoint) if checkpoint is not None else None
    except CheckpointError as error:
        yield Check("resume", "unknown", f"resume: the newest checkpoint can't be read here: {error}")
        return
    if document is None:
        return
    try:
        refuse_other_config(job, document["state"])
        with suppress(CacheError):  # the cache is another check's
            if (now := fingerprint_of(job.data)) is not None:
                refuse_other_cache(job, document["state"], now)
    except CheckpointError as error:
        yield Check("resume", "fail", str(error))
        return
    yield Check("resume", "pass", f"goes on from step {document['step']}")


def _disk(job: TrainJob) -> Check:
    folder = next(path for path in (job.out.resolve(), *job.out.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    try:
        count = _parameters(job.model.wan / objective_class(job.objective.kind).wan_parts[0])
    except (OSError, ValueError, KeyError) as error:
        return Check("disk", "unknown", f"{free / 1e9:.1f} GB are free; the weights can't be counted: {error}")
    needed = count * STATE_BYTES * (job.checkpoint.keep_last + 1)
    keep = job.checkpoint.keep_last
    said = f"{keep} checkpoints and one being written take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if needed > free:
        return Check("disk", "fail", f"{said} at {folder}; make room, or lower checkpoint.keep_last")
    return Check("disk", "pass", said)


def _parameters(folder: Path) -> int:
    """How many numbers the weights of a folder hold, from the headers of its files."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def _slurm(launch: LaunchConfig, script: str, asked: Sequence[Check]) -> Iterator[Check]:
    what = "partition, limits, account, qos, constraint"
    if not slurm_commands.available():
        yield Check("SLURM", "unknown", f"SLURM: no sbatch on this machine: {what}")
        yield from asked
        return
    try:
        yield _partition(launch)
    except ConfigError as error:
        yield Check("SLURM", "unknown", f"SLURM: {error}: {what}")
        yield from asked
        return
    yield from asked
    done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=60)
    said = " ".join((done.stderr or done.stdout).split())
    if done.returncode:
        yield Check("sbatch", "fail", f"SLURM would refuse the job: {said}")
    else:
        yield Check("sbatch", "pass", said.removeprefix("sbatch: "))


def _partition(launch: LaunchConfig) -> Check:
    try:
        facts = slurm_commands.partition(launch.partition)
    except slurm_commands.NoPartitionError as error:
        return Check("partition", "fail", str(error))
    name = facts["PartitionName"]
    problem = _limit(launch, name, facts)
    return Check("partition", "fail", problem) if problem else Check("partition", "pass", _describe(name, facts))


def _limit(launch: LaunchConfig, name: str, facts: dict[str, Any]) -> str | None:
    """What of the job is more than a partition allows."""
    if facts.get("State", "UP") != "UP":
        return f"partition {name} is {facts['State']}; use another launch.partition"
    longest = minutes(facts.get("MaxTime", ""))
    if launch.time_min and longest is not None and launch.time_min > longest:
        return f"launch.time_min is {launch.time_min}; partition {name} allows {longest}"
    for key in ("MaxNodes", "TotalNodes"):
        if facts.get(key, "").isdecimal() and launch.nodes > int(facts[key]):
            return f"launch.nodes is {launch.nodes}; partition {name} has {key} {facts[key]}"
    return None


def _describe(name: str, facts: dict[str, Any]) -> str:
    said = f"partition {name}: {facts.get('TotalNodes')} nodes, at most {facts.get('MaxTime')}"
    return f"{said}; a preempted job has {facts.get('GraceTime', '0')} s of grace, then KillWait"


def minutes(text: str) -> int | None:
    """SLURM's D-HH:MM:SS in minutes; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, mins, _ = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + mins
