"""Runs before and after every attempt of a SLURM job, in its batch script: ends the job or requeues it.

It asks SLURM for the reason of the end. SLURM requeues a preempted job itself, unless the job ends before its grace
time is over. In that case, at a time limit and after a crash, the job requeues itself. Each cause has a budget.
"""

import os
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from flowmask.launch.console import take_over
from flowmask.launch.jobs import KINDS
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm.commands import JobFacts
from flowmask.launch.slurm.submission import Attempt, NodeEnd, Submission, Verdict, Why
from flowmask.launch.slurm.task import array_task, restart_count
from flowmask.models.errors import UserError
from flowmask.models.process import CRASH_EXIT_CODE, MISTAKE_EXIT_CODE, OVER_EXIT_CODE, REQUEUE_EXIT_CODE
from flowmask.models.safe.words import printable
from flowmask.trainer.state.steps import newest

STOP_FILE = "stop"  # in the submission's folder: this file asks the job to end for good
EARLY_S = 90  # SLURM checks time limits once a minute, and may signal this much too early
_BUDGETS = {
    "preempted": "max_preemptions",
    "time limit": "max_timeouts",
    "crashed": "max_crashes",
    "node lost": "max_crashes",
}
_ADVICE = {
    "preempted": "raise launch.max_preemptions, or use another partition",
    "time limit": "raise launch.max_timeouts or launch.time_min",
    "crashed": "fix the cause, then submit again",
    "node lost": "raise launch.max_crashes, or exclude the bad node",
}


def before(folder: Path) -> int:
    """Record the end of attempts that were killed; returns OVER_EXIT_CODE if the job is over, else 0."""
    submission, job_id = Submission(folder), os.environ["SLURM_JOB_ID"]
    array, restart = array_task(), restart_count()
    kind, config = submission.job()
    close_lost_attempts(submission, job_id, array=array, restart=restart)
    attempts = submission.attempts(array=array)
    if not attempts or attempts[-1].why not in _BUDGETS:
        return 0  # a person restarted it
    verdict = judge(attempts, config["launch"], saves=KINDS[kind].SAVES)
    if verdict is not None:
        _say(submission, verdict, array=array)
    return 0 if verdict is None else OVER_EXIT_CODE


def after(folder: Path, srun_code: int) -> int:
    """Record why this attempt ended, and requeue the job or not; returns the job's exit code."""
    submission, job_id = Submission(folder), os.environ["SLURM_JOB_ID"]
    array, restart = array_task(), restart_count()
    kind, config = submission.job()
    launch = config["launch"]
    ends = submission.ended(array=array, restart=restart, nodes=launch["nodes"])
    facts = slurm_commands.job_facts(job_id)
    why, message = why_ended(
        ends,
        facts,
        restart=restart,
        margin_s=launch["signal_margin_s"],
        stop=(submission.folder / STOP_FILE).exists(),
        srun_code=srun_code,
    )
    attempt = Attempt(restart, why, message, checkpoint=newest_checkpoint(submission.out))
    submission.add_attempt(attempt, array=array)
    verdict = judge(submission.attempts(array=array), launch, saves=KINDS[kind].SAVES)
    if verdict is not None:
        _say(submission, replace(verdict, message=verdict.message + _left_waiting(verdict, job_id)), array=array)
        if verdict.code and facts is not None and facts.restarts > restart:
            slurm_commands.cancel(job_id)  # SLURM has already requeued it
        return verdict.code
    if facts is None or facts.state == "RUNNING":  # otherwise SLURM has already requeued it
        _requeue(job_id)
    return REQUEUE_EXIT_CODE


def why_ended(
    ends: list[NodeEnd | None],
    facts: JobFacts | None,
    *,
    restart: int,
    margin_s: int,
    stop: bool,
    srun_code: int,
    now: datetime | None = None,
) -> tuple[Why, str]:
    """The cause of an attempt's end, and one line about it. now: the current time; tests set it."""
    said = [end for end in ends if end is not None]
    if len(said) == len(ends) and all(end.code == 0 for end in said):
        return "finished", ""
    mistake = next((end for end in said if end.code == MISTAKE_EXIT_CODE), None)
    if mistake is not None:
        return "mistake", mistake.message
    if facts is not None and facts.restarts > restart:
        return "preempted", "SLURM took the nodes back"
    if facts is not None and facts.state != "RUNNING":
        return "cancelled", "the job was cancelled"
    if facts is not None and facts.preempted is not None:
        return "preempted", "SLURM requested the nodes"
    asked = bool(said) and all(end.code in (0, REQUEUE_EXIT_CODE) for end in said) and srun_code == 0
    if asked and stop:
        return "stopped", "stopped on request; everything is saved"
    if asked:
        late = next((end.message for end in said if end.message), "")
        left = None if facts is None or facts.ends is None else facts.ends - (now or datetime.now())
        if left is not None and left <= timedelta(seconds=margin_s + EARLY_S):
            return "time limit", late or "the time limit was near"
        return "preempted", late or "a signal requested a stop"
    crash = next((end for end in said if end.code == CRASH_EXIT_CODE), None)
    if crash is None:
        return "crashed", f"a task ended with code {srun_code} and no reason; see the logs of the submission"
    lines = crash.traceback.strip().splitlines()
    return "crashed", f"{crash.message}: {lines[-1]}" if lines else crash.message


def judge(attempts: list[Attempt], launch: dict[str, Any], *, saves: bool) -> Verdict | None:
    """The verdict if the job ends for good; None if it is requeued. saves: the job writes checkpoints."""
    last = attempts[-1]
    if last.why == "finished":
        return Verdict(0, "finished")
    if last.why == "mistake":
        return Verdict(MISTAKE_EXIT_CODE, "mistake", last.message)
    if last.why in ("cancelled", "stopped"):
        return Verdict(REQUEUE_EXIT_CODE, last.why, last.message)
    assert last.why is not None
    before = attempts[-2] if len(attempts) > 1 else None
    if saves and before is not None and last.why == "time limit" and _same(before, last):
        what = f"two time limits in a row without a new checkpoint ({last.message})"
        return Verdict(MISTAKE_EXIT_CODE, last.why, f"{what}: raise launch.time_min or launch.signal_margin_s")
    budget = _BUDGETS[last.why]
    count = sum(1 for attempt in attempts if _BUDGETS.get(attempt.why or "") == budget)
    if count > launch[budget]:
        what = f"{last.message}; {count} times, launch.{budget} is {launch[budget]}: {_ADVICE[last.why]}"
        return Verdict(MISTAKE_EXIT_CODE if last.why == "crashed" else REQUEUE_EXIT_CODE, last.why, what)
    return None


def _requeue(job_id: str) -> None:
    """Requeue with retries: SLURM's controller may be unavailable for a moment."""
    for wait_s in (1, 3):
        try:
            slurm_commands.requeue(job_id)
        except UserError:
            time.sleep(wait_s)
        else:
            return
    slurm_commands.requeue(job_id)


def _say(submission: Submission, verdict: Verdict, *, array: int) -> None:
    submission.set_verdict(verdict, array=array)
    if verdict.message:
        print(f"flowmask: {printable(verdict.message)}", file=sys.stderr)  # noqa: T201 - it is the log


def _left_waiting(verdict: Verdict, job_id: str) -> str:
    """Names the dependent jobs that can never start now."""
    waiting = slurm_commands.waiting_for(job_id) if verdict.code else []
    if not waiting:
        return ""
    jobs = " ".join(waiting)
    return f"; these jobs wait for it and can never start (afterok): {jobs}. Resubmit them, and: scancel {jobs}"


def _same(before: Attempt, last: Attempt) -> bool:
    return (before.why, before.checkpoint) == (last.why, last.checkpoint)


def close_lost_attempts(submission: Submission, job_id: str, *, array: int, restart: int) -> None:
    """Record the state from the accounting for attempts that were killed before they could record a reason."""
    known = {attempt.restart for attempt in submission.attempts(array=array)}
    lost = sorted(set(range(restart)) - known)
    if not lost:
        return
    states = slurm_commands.final_states(job_id)
    for number in lost:
        state = states[number] if number < len(states) else "NODE_FAIL"
        why: Why = "preempted" if state in ("PREEMPTED", "REQUEUED") else "node lost"
        submission.add_attempt(Attempt(number, why, f"SLURM says {state}"), array=array)


def newest_checkpoint(out: Path) -> str:
    """Name of the checkpoint from which the next attempt continues; empty if there is none."""
    checkpoint = newest(out)
    return checkpoint.name if checkpoint is not None else ""


if __name__ == "__main__":
    take_over()
    try:
        of = Path(sys.argv[1])
        sys.exit(before(of) if len(sys.argv) == 2 else after(of, int(sys.argv[2])))
    except UserError as error:
        print(f"flowmask: {printable(error)}", file=sys.stderr)  # noqa: T201 - it is the log
        sys.exit(CRASH_EXIT_CODE)
