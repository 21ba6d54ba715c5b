"""`flowmask submit`, and every other command with launch.cluster=slurm: check, freeze, submit, and wait if asked to.

The same config goes to SLURM, to processes of this machine or into this very process, by launch.cluster alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flowmask.launch.check import preflight
from flowmask.launch.config import CacheJob, EvaluateJob, TrainJob, read_tree, validate
from flowmask.launch.jobs import KINDS, run
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm import resources, snapshot
from flowmask.launch.slurm.submission import Submission
from flowmask.models.errors import ConfigError

INTERRUPTED = 130  # the shell's code for ^C
_ALIASES = {"decoder": "train"}
console = Console(stderr=True, soft_wrap=True, highlight=False)


def submit(config: Path, overrides: Sequence[str], *, wait: bool, dry_run: bool) -> int:
    """Submit the job of a config of any kind; with `dry_run` only print what would be done. The exit code."""
    tree = read_tree(config, overrides)
    kind, because = kind_of(tree, origin=str(config))
    tree.pop("kind", None)
    job: CacheJob | TrainJob | EvaluateJob = validate(tree, KINDS[kind], origin=str(config))
    if dry_run:
        Console(soft_wrap=True, highlight=False, markup=False).print(describe(kind, job, because=because))
        return 0
    console.print(f"{config}: {kind}, {because}", markup=False)
    if job.launch.cluster != "slurm":
        preflight.refuse(preflight.examine(job, None))
    return run(kind, job, wait=wait)


def kind_of(tree: dict[Any, Any], *, origin: str) -> tuple[str, str]:
    """What job a config describes, and how that was told; ConfigError when nothing tells."""
    if "kind" in tree:
        named = str(tree["kind"])
        if named not in KINDS | _ALIASES:
            raise ConfigError(f"{origin}: kind is {named}; it must be {', '.join([*KINDS, *_ALIASES])}")
        return _ALIASES.get(named, named), f"because kind is {named}"
    if "train" in tree:
        return "train", "because it has the section train"
    if isinstance(tree.get("checkpoint"), str):
        return "evaluate", "because it names a checkpoint to score"
    data = tree.get("data")
    if "model" in tree and (isinstance(data, list) or (isinstance(data, dict) and "root" in data)):
        return "cache", "because it has a dataset and encoders, and nothing to train or to score"
    raise ConfigError(f"{origin}: can't tell what job this is; add kind: {', '.join([*KINDS, *_ALIASES])}")


def to_slurm(kind: str, job: CacheJob | TrainJob | EvaluateJob, *, wait: bool) -> int:
    """Submit a job; 0 once it is in the queue or, with `wait`, once it is done.

    Raises UserError with the job's own reason when it ends otherwise. ^C leaves it running; then 130.
    """
    from flowmask.launch.slurm import executor as slurm
    from flowmask.launch.slurm import wait as waiting

    slurm_commands.require()
    name, asked = _name(kind, job), resources.settle(job)
    script = slurm.script(job.out, asked.launch, name=name)
    preflight.refuse(preflight.examine(job, script, asked.checks))
    submission = Submission.create(job.out, kind=kind, resolved=job.model_dump(mode="json"))
    code = snapshot.freeze(submission.folder)
    job_id = slurm.submit(submission, asked.launch, name=name, code=code)
    console.print(f"submitted job {job_id}; its logs: {submission.logs}", markup=False)
    if not wait:
        return 0
    try:
        return waiting.wait(submission)
    except KeyboardInterrupt:
        waiting.say_left(submission)
        return INTERRUPTED


def describe(kind: str, job: CacheJob | TrainJob | EvaluateJob, *, because: str) -> str:
    """What `submit` would do: the script, if there is one, then the plan as comments below it. Writes nothing."""
    launch, script, asked = job.launch, None, None
    if launch.cluster == "slurm":
        from flowmask.launch.slurm import executor as slurm

        asked = resources.settle(job)
        script = slurm.script(job.out, asked.launch, name=_name(kind, job))
    tasks = f"{launch.array} tasks x " if launch.array > 1 else ""
    lines = [
        f"{kind}, {because}",
        f"out: {job.out.resolve()}",
        f"where: {launch.cluster}, {tasks}{launch.nodes} nodes x {launch.processes_per_node} processes",
    ]
    if asked is not None:
        limit = f"{launch.time_min} min" if launch.time_min else "the partition's"
        lines += [
            asked.said,
            f"time limit: {limit}; saves {launch.signal_margin_s} s before it and goes back into the queue",
            f"goes on after {launch.max_preemptions} preemptions, {launch.max_timeouts} time limits, "
            f"{launch.max_crashes} crashes",
        ]
    checks = preflight.examine(job, script, asked.checks if asked else ())
    titles = {"pass": "checked:", "fail": "submit would refuse:", "unknown": "could not be checked here:"}
    for state, title in titles.items():
        found = [f"  {check.found}" for check in checks if check.state == state]
        lines += [title, *found] if found else []
    return "\n".join([script or "", *(f"# {line}" for line in lines)]).strip()


def _name(kind: str, job: CacheJob | TrainJob | EvaluateJob) -> str:
    """What the queue calls the job."""
    return f"flowmask-{kind}-{job.out.resolve().name}"
