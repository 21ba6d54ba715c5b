"""The only place that chooses where a job runs: in processes here, in the current process, or on SLURM.

launch.cluster alone decides, with the same config. Checks run before anything starts.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from flowmask.launch import jobs
from flowmask.launch.check import preflight
from flowmask.launch.console import err, out
from flowmask.launch.jobs import KINDS
from flowmask.launch.jobs.job import Job
from flowmask.launch.local.processes import JobFailedError, run_local
from flowmask.launch.next_steps import NOT_DRY, say_after, say_next
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm import resources, snapshot
from flowmask.launch.slurm.submission import Submission
from flowmask.models.errors import UserError
from flowmask.models.process import CRASH_EXIT_CODE, INTERRUPTED_EXIT_CODE, MISTAKE_EXIT_CODE
from flowmask.trainer.state.owner import note_end

_REFUSES = "submit would refuse:"


def start(kind: str, config: Path, overrides: Sequence[str] = (), *, wait: bool = True) -> int:
    """Read the config of a job and run it where `launch.cluster` says; prints the next step, returns the exit code."""
    job = jobs.load_kind(config, KINDS[kind], overrides)
    code = run(job, wait=wait)
    say_after(job.makes, job.out, code, queued=job.launch.cluster == "slurm" and not wait)
    return code


def run(job: Job, *, wait: bool = True) -> int:
    """Run a job, one process per rank; returns 0, or the exit code that requests a requeue.

    wait: on a cluster, return only when the job has ended. A job on this machine is always waited for.
    """
    if job.launch.cluster == "slurm":
        return to_slurm(job, wait=wait)
    os.environ.update(job.hidden())  # for the ranks: the saved config lacks these values
    resolved = job.model_dump(mode="json")
    try:
        if job.launch.cluster == "debug":
            code = jobs.run_rank(job.KIND, resolved)
        else:
            code = run_local(job.KIND, resolved, processes=job.launch.processes_per_node)
    except JobFailedError as error:
        last = error.traceback.strip().splitlines()[-1:]
        note_end(job.out, code=CRASH_EXIT_CODE, message=": ".join([error.what, *last]))
        raise
    except UserError as error:
        note_end(job.out, code=MISTAKE_EXIT_CODE, message=str(error))
        raise
    note_end(job.out, code=code)
    return code


def submit(config: Path, overrides: Sequence[str], *, wait: bool, dry_run: bool) -> int:
    """Submit the job of any config; with `dry_run` only print the plan. Returns the exit code."""
    job, because = jobs.load_any(config, overrides)
    err.print(f"{config}: {job.KIND}, because {because}")  # printed first: the checks import torch
    if dry_run:
        out.print(said := describe(job, because=because))
        if _REFUSES not in said:
            say_next(NOT_DRY)
        return 0
    if job.launch.cluster != "slurm":
        preflight.refuse(preflight.examine(job))
    code = run(job, wait=wait)
    say_after(job.makes, job.out, code, queued=job.launch.cluster == "slurm" and not wait)
    return code


def to_slurm(job: Job, *, wait: bool) -> int:
    """Submit a job. Returns 0 once it is queued or, with `wait`, once it is done.

    Raises UserError with the job's own reason if it fails. ^C leaves the job running and returns 130.
    """
    from flowmask.launch.slurm import executor as slurm
    from flowmask.launch.slurm import wait as waiting

    slurm_commands.require()
    name, asked, hidden = _name(job), resources.settle(job), job.hidden()
    script = slurm.script(job.out, slurm.whole(asked.launch), name=name)
    findings = preflight.examine(job, script, asked.findings)
    preflight.refuse(findings)
    for finding in findings:
        if finding.state == "warn":
            err.print(finding.said)
    submission = Submission.create(job.out, kind=job.KIND, resolved=job.model_dump(mode="json"))
    code = snapshot.freeze(submission.folder)
    if ignored := slurm_commands.ignored_options():
        err.print(f"ignored variables: {', '.join(ignored)}; use launch.account, launch.sbatch_args and so on instead")
    try:
        job_id = slurm.submit(submission, asked.launch, name=name, code=code, hidden=hidden)
    except slurm.NotTakenError:
        submission.forget()
        raise
    err.print(f"submitted job {job_id}; its logs: {submission.logs}")
    if not wait:
        return 0
    try:
        return waiting.wait(submission)
    except KeyboardInterrupt:
        waiting.say_left(submission)
        return INTERRUPTED_EXIT_CODE


def describe(job: Job, *, because: str) -> str:
    """The plan of `submit`: the sbatch script, if any, then comments. Writes nothing."""
    launch, script, printed, asked = job.launch, None, "", None
    if launch.cluster == "slurm":
        from flowmask.launch.slurm import executor as slurm

        asked = resources.settle(job)
        script = slurm.script(job.out, slurm.whole(asked.launch), name=_name(job))
        printed = slurm.script(job.out, slurm.shown(asked.launch), name=_name(job))
    count = resources.counted
    tasks = f"{launch.array} tasks x " if launch.array > 1 else ""
    place = f"{tasks}{count(launch.nodes, 'node')} x {count(launch.processes_per_node, 'process')}"
    lines = [f"{job.KIND}, because {because}", f"out: {job.out.resolve()}", f"where: {launch.cluster}, {place}"]
    if asked is not None:
        limit = f"{launch.time_min} min" if launch.time_min else "the partition's"
        lines += [
            asked.said,
            f"time limit: {limit}; saves {launch.signal_margin_s} s before it, then is requeued",
            f"restarts after at most {launch.max_preemptions} preemptions, {launch.max_timeouts} time limits, "
            f"{launch.max_crashes} crashes",
        ]
    findings = preflight.examine(job, script, asked.findings if asked else ())
    titles = {"pass": "checked:", "warn": "take note:", "fail": _REFUSES}
    titles["unknown"] = "could not be checked here:"
    for state, title in titles.items():
        found = [f"  {finding.said}" for finding in findings if finding.state == state]
        lines += [title, *found] if found else []
    return "\n".join([printed, *(f"# {line}" for line in lines)]).strip()


def _name(job: Job) -> str:
    """The job's name in the queue."""
    return f"flowmask-{job.KIND}-{job.out.resolve().name}"
