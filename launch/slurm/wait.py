"""Watches a submitted job through its files and the queue until it has ended; never acts on it.

A failed array task is reported at once but ends nothing: the other tasks take over its work.
"""

import time
from collections import Counter

from flowmask.launch.console import err
from flowmask.launch.progress import Update, bar
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm.submission import Submission, Verdict
from flowmask.models.errors import UserError
from flowmask.models.safe.words import printable

POLL_S = 1.0
QUEUE_EVERY_S = 5.0  # frequent queries of many users slow down a cluster's queue
TAIL_S = 60.0  # time for the last workers to leave a finished cache


class JobEndedError(UserError):
    """A job on the cluster ended without a result; the message gives the reason."""


def wait(submission: Submission) -> int:
    """Return 0 when the job is done; raises JobEndedError with a one-line reason if it failed."""
    watcher = _Watcher(submission)
    with bar() as update:
        while not watcher.over():
            watcher.look(update)
            time.sleep(POLL_S)
    return watcher.outcome()


class _Watcher:
    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        self.job = submission.kind()
        self.job_id, self.array = submission.slurm()
        self.queue: dict[str, tuple[str, str]] = {"unknown yet": ("PENDING", "")}
        self.asked, self.told = 0.0, ""
        self.warned: set[int] = set()

    def look(self, update: Update) -> None:
        """Report what has changed."""
        if time.monotonic() - self.asked > QUEUE_EVERY_S:
            self.job.show_progress(self.submission.out, update)
            self.queue, self.asked = slurm_commands.queued(self.job_id), time.monotonic()
            self._tell_states()
        for task, verdict in self.submission.verdicts().items():
            if verdict.code and task not in self.warned and self.array > 1:
                self.warned.add(task)
                err.print(f"task {task} ended: {printable(verdict.message)}; the others continue")

    def over(self) -> bool:
        """Whether the job is over for good."""
        if self._has_result():
            self._let_workers_leave()
            return True
        return len(self.submission.verdicts()) == self.array or not self.queue

    def outcome(self) -> int:
        """0 on success; raises the reason otherwise."""
        verdicts = self.submission.verdicts()
        ended_well = [verdict.code for verdict in verdicts.values()] == [0]
        if self._has_result() if self.job.RESULT else ended_well:
            return 0
        raise JobEndedError(_reason(verdicts) or self._unexplained())

    def _has_result(self) -> bool:
        return bool(self.job.RESULT) and (self.submission.out / self.job.RESULT).exists()

    def _unexplained(self) -> str:
        states = slurm_commands.final_states(self.job_id)
        state = f"SLURM says {', '.join(sorted(set(states)))}" if states else "SLURM does not know why"
        return f"job {self.job_id} ended early: {state}; its output is in {self.submission.logs}"

    def _let_workers_leave(self) -> None:
        until = time.monotonic() + TAIL_S
        while time.monotonic() < until:
            states = {state for state, _ in slurm_commands.queued(self.job_id).values()}
            if not states & {"RUNNING", "COMPLETING"}:
                return
            time.sleep(POLL_S)

    def _tell_states(self) -> None:
        counts = Counter(
            f"{state.lower()} ({reason})" if state == "PENDING" and reason not in ("None", "") else state.lower()
            for state, reason in self.queue.values()
        )
        said = ", ".join(f"{count} {what}" if self.array > 1 else what for what, count in sorted(counts.items()))
        if said and said != self.told:
            err.print(f"job {self.job_id}: {said}")
        self.told = said or self.told


def say_left(submission: Submission) -> None:
    """Tell a person who stops waiting how to continue."""
    job_id, _ = submission.slurm()
    watch = f"flowmask status {submission.out}"
    err.print(f"job {job_id} goes on. Watch it: {watch}; logs: {submission.logs}; end it: scancel {job_id}")


def _reason(verdicts: dict[int, Verdict]) -> str:
    failed = [verdict for verdict in verdicts.values() if verdict.code]
    failed.sort(key=lambda verdict: verdict.why != "mistake")  # user errors, which a person can fix, come first
    return failed[0].message if failed else ""
