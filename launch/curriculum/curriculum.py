"""`flowmask curriculum`: the stages of one YAML, here one after another, or on SLURM with `afterok` dependencies.

Everything is checked before anything starts. Finished stages are skipped. If this process ends, the same
command continues.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.live import Live
from rich.table import Table
from rich.text import Text

from flowmask.launch import dispatch
from flowmask.launch.console import err
from flowmask.launch.console import out as printer
from flowmask.launch.curriculum import jobs as stage_jobs
from flowmask.launch.curriculum.checks import check
from flowmask.launch.curriculum.done import Judgement, judge, judge_all
from flowmask.launch.curriculum.stages import MARK, Curriculum, Stage
from flowmask.launch.finding import Finding
from flowmask.launch.jobs import TrainJob
from flowmask.launch.local.processes import JobFailedError
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm import resources
from flowmask.launch.slurm.wait import JobEndedError
from flowmask.models.errors import UserError
from flowmask.models.files import read_object, write_atomically
from flowmask.models.folders import locks
from flowmask.models.folders.output_folder import Kind, OutputFolder
from flowmask.models.process import INTERRUPTED_EXIT_CODE
from flowmask.trainer.track.spool import Status

POLL_S = 5.0
CURRICULUM = Kind("a curriculum", lambda out: () if isinstance(read_object(out / MARK).get("stages"), list) else None)


def run_curriculum(
    curriculum: Curriculum,
    *,
    wait: bool,
    dry_run: bool = False,
    after_stage: Callable[[], None] = lambda: None,
    at_end: Callable[[Status], None] | None = None,
) -> int:
    """Check a curriculum and run its unfinished stages; returns the exit code. UserError names the failed stage.

    wait: on SLURM, show the progress until the last stage has ended. dry_run: only print the plan.
    after_stage: called here whenever a stage has just finished.
    at_end: called once the last stage has ended, if this process sees it; None: reports to MLflow.
    """
    err.print(f"{len(curriculum.stages)} stages: checking which are done")  # imports torch
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            memo = curriculum.out if (curriculum.out / MARK).exists() else Path(scratch)
            judged = judge_all(curriculum, memo=memo)
            _describe(curriculum, judged, check(curriculum, done=_done(judged)))
        return 0
    with _claimed(curriculum):
        judged = judge_all(curriculum, memo=curriculum.out)
        check(curriculum, done=_done(judged))
        _begin_tracking(curriculum)
        tell = at_end or partial(_track, curriculum)
        if curriculum.cluster != "slurm":
            return _to_the_end(lambda: _run_here(curriculum, after_stage), tell)
        slurm_commands.require()
        sent = _submit_all(curriculum, judged)
    if not wait and sent.jobs:
        return 0
    try:
        return _to_the_end(lambda: _watch(curriculum, sent) if sent.jobs else _all_done(curriculum), tell)
    except KeyboardInterrupt:
        ids = " ".join(sent.jobs.values())
        err.print(f"the jobs continue. Watch them: flowmask status {curriculum.out}; cancel them: scancel {ids}")
        return INTERRUPTED_EXIT_CODE


def _to_the_end(work: Callable[[], int], tell: Callable[[Status], None]) -> int:
    """Do `work`, which runs or sees the last stage, and report its end with `tell`; returns the exit code."""
    try:
        code = work()
    except UserError:
        tell("FAILED")
        raise
    tell("KILLED" if code else "FINISHED")
    return code


def _begin_tracking(curriculum: Curriculum) -> None:
    """Write the plan of the trainings' parent run in MLflow; each training makes itself its child."""
    from flowmask.trainer.track.groups import begin_group

    trainings = [stage.job for stage in curriculum.stages if isinstance(stage.job, TrainJob)]
    begin_group(curriculum.group, trainings, name=curriculum.title, command="flowmask curriculum", say=err.print)


def _track(curriculum: Curriculum, status: Status) -> None:
    from flowmask.trainer.track.groups import end_group

    runs = [stage.out for stage in curriculum.stages if isinstance(stage.job, TrainJob)]
    end_group(curriculum.group, runs, status, say=err.print)


def _done(judged: Mapping[str, Judgement]) -> set[str]:
    return {name for name, found in judged.items() if found.done}


@contextmanager
def _claimed(curriculum: Curriculum) -> Iterator[None]:
    """Lock the folder of this curriculum against a second process that would submit the same stages."""
    out = curriculum.out
    with OutputFolder(out, CURRICULUM).held(patience_s=locks.GLANCE_S):
        stages = [{"name": s.name, "kind": s.job.KIND, "out": str(s.out.resolve())} for s in curriculum.stages]
        write_atomically(out / MARK, json.dumps({"config": str(curriculum.path), "stages": stages}, indent=1))
        yield


def _run_here(curriculum: Curriculum, after_stage: Callable[[], None]) -> int:
    """Run one stage after another. Each is judged just before it runs, when its needs are done."""
    for number, stage in enumerate(curriculum.stages, 1):
        head = Text.assemble(
            (f"{number}/{len(curriculum.stages)} ", "bold"), f"{stage.name}: {stage.job.KIND}, {stage.out}: "
        )
        found = judge(stage, unfinished=set(), memo=curriculum.out)
        if found.done:
            err.print(head + Text(f"done, {found.why}", "green"))
            continue
        err.print(head + Text(found.why, "cyan"))
        code = _with_retries(stage)
        if code:
            err.print(f"stopped in stage {stage.name}; the same command continues")
            return code
        found = judge(stage, unfinished=set(), memo=curriculum.out)
        if not found.done:
            raise UserError(f"stage {stage.name} ended without its result: {found.why}; see {stage.out}")
        after_stage()
    return _all_done(curriculum)


def _all_done(curriculum: Curriculum) -> int:
    err.print(f"all {len(curriculum.stages)} stages are done")
    return 0


def _with_retries(stage: Stage) -> int:
    """Run a stage, and retry after a crash. A user error is not retried."""
    left = stage.retries or 0
    while True:
        try:
            return dispatch.run(stage.job)
        except JobFailedError as error:
            if not left:
                raise JobFailedError(f"stage {stage.name}: {error.what}", error.traceback) from error
            left -= 1
            err.print(f"stage {stage.name}: {error.what}; starting again, {left} retries left")
        except UserError as error:
            raise type(error)(f"stage {stage.name}: {error}") from error


@dataclass
class _Sent:
    """Job ids of the unfinished stages, by stage; `fresh`: submitted by this process."""

    jobs: dict[str, str] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)


def _submit_all(curriculum: Curriculum, judged: Mapping[str, Judgement]) -> _Sent:
    """Give every unfinished stage exactly one job, which waits for the jobs of its needs."""
    sent = _Sent()
    for stage in curriculum.stages:
        if judged[stage.name].done:
            err.print(f"{stage.name}: done, {judged[stage.name].why}")
            continue
        earlier = curriculum.before(stage)
        job_id = _live(curriculum, stage, renewed=bool(earlier & sent.fresh))
        if job_id is None:
            # a job that is no longer in the queue may have ended well since the stage was judged
            found = judge(stage, unfinished=earlier & sent.jobs.keys(), memo=curriculum.out)
            if found.done:
                err.print(f"{stage.name}: done, {found.why}")
                continue
            after = [sent.jobs[name] for name in sent.jobs if name in earlier]
            job_id = stage_jobs.submit(curriculum.out, stage, after=after)
            sent.fresh.add(stage.name)
            behind = f" after {', '.join(after)}" if after else ""
            err.print(f"{stage.name}: submitted job {job_id}{behind}; {found.why}")
        else:
            err.print(f"{stage.name}: already submitted as job {job_id}")
        sent.jobs[stage.name] = job_id
    return sent


def _live(curriculum: Curriculum, stage: Stage, *, renewed: bool) -> str | None:
    """The stage's job, if it is in the queue and can still start. A job that can never start is cancelled.

    renewed: a need was submitted again, so a job in the queue would wait for the wrong one.
    """
    job_id = stage_jobs.known_job(curriculum.out, stage)
    rows = slurm_commands.queued(job_id) if job_id else {}
    if job_id is None or not rows:
        return None
    pending = all(state == "PENDING" for state, _ in rows.values())
    if pending and (renewed or any(stage_jobs.NEVER in reason for _, reason in rows.values())):
        record = stage_jobs.read(curriculum.out, stage.name)
        assert record is not None, "it has a job"
        slurm_commands.cancel(job_id, logs=record.submission.logs)
        return None
    return job_id


def _watch(curriculum: Curriculum, sent: _Sent) -> int:
    """Show the stages until no job is left. Raises JobEndedError with the first failed stage and its reason."""
    with Live(console=err, refresh_per_second=1, transient=True) as live:
        told: dict[str, str] = {}
        while True:
            rows = slurm_commands.queued(",".join(sent.jobs.values()))
            states = {name: _state_of(rows, job_id) for name, job_id in sent.jobs.items()}
            live.update(_table(curriculum, sent, states))
            for name, state in states.items():
                if told.get(name) != state and not err.is_terminal:
                    err.print(f"{name}: {state}")
            told = states
            if not rows:
                break
            time.sleep(POLL_S)
    judged = judge_all(curriculum, memo=curriculum.out)
    for stage in curriculum.stages:
        if not judged[stage.name].done:
            raise JobEndedError(f"stage {stage.name}: {_reason(curriculum, stage, judged[stage.name])}")
    return _all_done(curriculum)


def _state_of(rows: Mapping[str, tuple[str, str]], job_id: str) -> str:
    own = [row for task, row in rows.items() if task.partition("_")[0] == job_id]
    if not own:
        return "ended"
    state, reason = own[0]
    return f"waits ({reason})" if state == "PENDING" else state.lower()


def _reason(curriculum: Curriculum, stage: Stage, judged: Judgement) -> str:
    record = stage_jobs.read(curriculum.out, stage.name)
    if record is None:
        return judged.why
    failed = [verdict.message for verdict in record.submission.verdicts().values() if verdict.code]
    why = failed[0] if failed and failed[0] else f"job {record.job_id} ended early, {judged.why}"
    return f"{why}; logs: {record.submission.logs}. The same command continues from here"


def _table(curriculum: Curriculum, sent: _Sent, states: Mapping[str, str]) -> Table:
    table = Table("stage", "kind", "job", "state", box=None, padding=(0, 2, 0, 0))
    for stage in curriculum.stages:
        job_id = sent.jobs.get(stage.name, "")
        table.add_row(stage.name, stage.job.KIND, job_id, states.get(stage.name, "done"))
    return table


def _describe(curriculum: Curriculum, judged: Mapping[str, Judgement], findings: Sequence[Finding]) -> None:
    """Print the stages, the needs of each, and whether it would run."""
    printer.print(f"{curriculum.path}: {len(curriculum.stages)} stages, launch.cluster={curriculum.cluster}")
    for number, stage in enumerate(curriculum.stages, 1):
        found = judged[stage.name]
        printer.print(f"{number}. {stage.name}: {'skip' if found.done else 'run'} ({found.why})")
        printer.print(f"     {stage.job.KIND}, out {stage.out}")
        if curriculum.cluster == "slurm" and not found.done:
            printer.print(f"     {resources.settle(stage.job).said}")
        if stage.needs:
            printer.print(f"     after {', '.join(stage.needs)}")
        for key, name in stage.carries.items():
            printer.print(f"     {key} from {name}")
        record = stage_jobs.read(curriculum.out, stage.name) if curriculum.cluster == "slurm" else None
        if record is not None and record.job_id:
            known = slurm_commands.available()
            says = _state_of(slurm_commands.queued(record.job_id), record.job_id) if known else "no squeue here"
            printer.print(f"     job {record.job_id}: {says}")
    for line in sorted({found.said for found in findings if found.state == "unknown"}):
        printer.print(f"could not be checked here: {line}")
