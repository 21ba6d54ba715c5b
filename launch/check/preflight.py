"""Checks of a job on the login node, before it waits in the queue: paths, fingerprints, disk, SLURM's limits.

A check passes, fails with a fix, or is unknown here, with what it needs. Loads no weights and writes nothing.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.cache.manifest import read_manifest
from flowmask.launch.check.attention import attention
from flowmask.launch.finding import Finding
from flowmask.launch.jobs import TrainJob
from flowmask.launch.jobs.job import Job
from flowmask.launch.launch_config import LaunchConfig
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.models.errors import CacheError, CheckpointError, ConfigError, UserError, WeightsError
from flowmask.models.folders.output_folder import own_files
from flowmask.trainer.config import RunConfig
from flowmask.trainer.run.schedule import behind_the_end
from flowmask.trainer.state.steps import newest
from flowmask.trainer.step.sequence_parallel import refuse_uneven
from flowmask.trainer.train_config import accumulation_steps, workers


def examine(
    job: Job,
    script: str | None = None,
    asked: Sequence[Finding] = (),
    *,
    expected: Callable[[Path], bool] = lambda path: False,
) -> list[Finding]:
    """Run every check of a job. script: the sbatch script; None for a job on this machine.

    asked: findings of `flowmask.launch.slurm.resources` about the nodes of the job.
    expected: whether an earlier job will make a missing path.
    """
    found = [_out(job), *_inputs(job, expected)]
    if isinstance(job, TrainJob):
        found += [_batch(job), *_tokens(job), *_resume(job)]
    if script is not None:
        found += _slurm(job.launch, script, asked)
    if isinstance(job, TrainJob) and all(finding.state != "fail" for finding in found):
        found += [_disk(job), _deepspeed(job)]  # last, because they import torch: only for a job without faults so far
    if all(finding.state != "fail" for finding in found):
        found += attention(job, here=script is None)
    return found


def refuse(findings: Sequence[Finding]) -> None:
    """Raises ConfigError with every failed check, in one line."""
    failed = [finding.said for finding in findings if finding.state == "fail"]
    if failed:
        numbered = " ".join(f"({number}) {said}" for number, said in enumerate(failed, start=1))
        raise ConfigError(failed[0] if len(failed) == 1 else f"{len(failed)} problems: {numbered}")


def existing(path: Path) -> Path:
    """The deepest part of a path that already exists."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())


def _out(job: Job) -> Finding:
    out, place = job.out, existing(job.out)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding("out", "fail", f"out is {out}; {place} is not writable: choose another out")
    try:
        if out.is_dir():
            own_files(out, job.folder_kind())
    except UserError as error:
        return Finding("out", "fail", str(error))
    return Finding("out", "pass", f"out: {out.resolve()} is writable")


def _inputs(job: Job, expected: Callable[[Path], bool]) -> Iterator[Finding]:
    for key, path, what in ((each.key, each.path, each.what) for each in job.inputs()):
        if path.exists():
            yield Finding(key, "pass", f"{key}: {path} exists")
        elif expected(path):
            yield Finding(key, "pass", f"{key}: {path} will exist by then", path=path)
        else:
            said = f"{key}: {path} does not exist; it must be {what}, visible from this node"
            yield Finding(key, "fail", said, path=path)
    if job.UNCHECKED:
        yield Finding("not checked", "unknown", job.UNCHECKED)


def _batch(job: TrainJob) -> Finding:
    world, train = job.launch.world_size, job.train
    passes = accumulation_steps(train, world)
    said = f"{workers(train, world)} x micro-batch {train.micro_batch} x {passes} = global batch {train.global_batch}"
    return Finding("batch", "pass", f"{said}; ZeRO {train.zero_stage}, {train.precision}")


def _deepspeed(job: TrainJob) -> Finding:
    from flowmask.trainer.step import zero

    try:
        version = zero.check(job.train, world=job.launch.world_size)
    except ConfigError as error:
        return Finding("deepspeed", "fail", str(error))
    return Finding("deepspeed", "pass", f"DeepSpeed {version} accepts the config of this training")


def _tokens(job: TrainJob) -> Iterator[Finding]:
    """Whether `train.sequence_parallel` processes can share the tokens of each clip evenly."""
    ranks = job.train.sequence_parallel
    if ranks == 1:
        return
    from flowmask.models.strict import read_json

    try:
        shape = read_json(job.model.wan / "transformer" / "config.json")
        buckets = [bucket for cache in job.caches() for bucket in read_manifest(cache).buckets]
        refuse_uneven(shape, ranks=ranks, buckets=buckets)
    except ConfigError as error:
        yield Finding("tokens", "fail", str(error))
        return
    except (CacheError, WeightsError, KeyError, TypeError):
        return  # other checks report the paths
    yield Finding("tokens", "pass", f"train.sequence_parallel: {ranks} processes share each clip's tokens evenly")


def _resume(job: TrainJob) -> Iterator[Finding]:
    """Length of the run. For a resumed run also: settings and cache are unchanged, as the job itself will check."""
    from flowmask.trainer.state.checkpoint import read_run
    from flowmask.trainer.state.length import if_known
    from flowmask.trainer.state.resume import fingerprint_of, refuse_other_cache, refuse_other_config, settled

    try:
        job = if_known(job)
    except ConfigError as error:
        yield Finding("steps", "fail", str(error))
        return
    if job.train.epochs is not None:
        said = f"train.epochs is {job.train.epochs}: the number of steps will be known once {job.data.caches} exist"
        yield Finding("steps", "unknown", said)
    try:
        checkpoint = newest(job.out)
        document = read_run(checkpoint) if checkpoint is not None else None
    except CheckpointError as error:
        yield Finding("resume", "unknown", f"resume: the newest checkpoint can't be read here: {error}")
        return
    if document is None:
        yield from _schedule(settled(job, {}), step=0)
        return
    try:
        refuse_other_config(job, document["state"])
        with suppress(CacheError):  # another check reports the cache
            if (now := fingerprint_of(job.data)) is not None:
                refuse_other_cache(job, document["state"], now)
    except CheckpointError as error:
        yield Finding("resume", "fail", str(error))
        return
    yield Finding("resume", "pass", f"continues from step {document['step']}")
    yield from _schedule(settled(job, document["state"]), step=document["step"])


def _schedule(config: RunConfig, *, step: int) -> Iterator[Finding]:
    if (
        config.train.steps is not None
        and (behind := behind_the_end(config.train, step=step, out=config.out)) is not None
    ):
        yield Finding("schedule", "warn", behind)


def _disk(job: TrainJob) -> Finding:
    from flowmask.launch.plan.model import architecture, trained_module
    from flowmask.launch.plan.train import Disk

    place = existing(job.out)
    free = shutil.disk_usage(place).free
    try:
        disk = Disk.of(job, trained_module(job, architecture(job.model.wan)))
    except UserError as error:
        return Finding("disk", "fail", str(error))
    said = f"{disk.checkpoints} checkpoints take {disk.bytes / 1e9:.3g} GB, {free / 1e9:.1f} GB are free"
    if disk.bytes > free:
        return Finding("disk", "fail", f"{said} at {place}; make room, or lower checkpoint.keep_last")
    return Finding("disk", "pass", said)


def _slurm(launch: LaunchConfig, script: str, asked: Sequence[Finding]) -> Iterator[Finding]:
    try:
        if not slurm_commands.available():
            raise ConfigError("no sbatch on this machine")
        yield _partition(launch)
    except ConfigError as error:
        yield Finding("SLURM", "unknown", f"SLURM: {error}: partition, limits, account, qos, constraint")
        yield from asked
        return
    yield from asked
    done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=60)
    said = " ".join((done.stderr or done.stdout).split())
    if done.returncode:
        yield Finding("sbatch", "fail", f"SLURM would refuse the job: {said}")
    else:
        yield Finding("sbatch", "pass", said.removeprefix("sbatch: "))


def _partition(launch: LaunchConfig) -> Finding:
    try:
        facts = slurm_commands.partition(launch.partition)
    except slurm_commands.NoPartitionError as error:
        return Finding("partition", "fail", str(error))
    name = facts["PartitionName"]
    if problem := _limit(launch, name, facts):
        return Finding("partition", "fail", problem)
    said = f"partition {name}: {facts.get('TotalNodes')} nodes, at most {facts.get('MaxTime')}"
    grace = f"a preempted job has {facts.get('GraceTime', '0')} s of grace, then KillWait"
    return Finding("partition", "pass", f"{said}; {grace}")


def _limit(launch: LaunchConfig, name: str, facts: dict[str, Any]) -> str | None:
    """The setting of the job that exceeds a limit of the partition."""
    if facts.get("State", "UP") != "UP":
        return f"partition {name} is {facts['State']}; use another launch.partition"
    longest = minutes(facts.get("MaxTime", ""))
    if launch.time_min and longest is not None and launch.time_min > longest:
        return f"launch.time_min is {launch.time_min}; partition {name} allows {longest}"
    for key in ("MaxNodes", "TotalNodes"):
        if facts.get(key, "").isdecimal() and launch.nodes > int(facts[key]):
            return f"launch.nodes is {launch.nodes}; partition {name} has {key} {facts[key]}"
    return None


def minutes(text: str) -> int | None:
    """SLURM's D-HH:MM:SS in minutes; None for UNLIMITED and similar."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, mins, _ = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + mins
