"""Why a SLURM job ended, and whether it starts again: each cause is recognised and has a separate budget."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm.commands import JobFacts
from flowmask.launch.slurm.requeue import after, before, judge, why_ended
from flowmask.launch.slurm.submission import Attempt, NodeEnd, Submission, Why
from flowmask.models.process import OVER_EXIT_CODE, REQUEUE_EXIT_CODE

NOW = datetime(2030, 1, 1, 12)
DONE, SAVED, CRASH = (
    NodeEnd(0),
    NodeEnd(REQUEUE_EXIT_CODE),
    NodeEnd(1, "rank 1 ended with code 1", "...\nKeyError: 'x'\n"),
)
MISTAKE = NodeEnd(2, "train.lr is odd")
BUDGETS = {"max_preemptions": 2, "max_timeouts": 1, "max_crashes": 1}


def facts(state: str = "RUNNING", *, restarts: int = 0, left_s: float = 7200, preempted: bool = False) -> JobFacts:
    return JobFacts(state, restarts, NOW + timedelta(seconds=left_s), NOW if preempted else None)


@pytest.mark.parametrize(
    ("ends", "found", "stop", "srun_code", "why"),
    [
        ([DONE, DONE], facts(), False, 0, "finished"),
        ([DONE, DONE], facts("COMPLETING"), False, 0, "finished"),
        ([SAVED, MISTAKE], facts(), False, 2, "mistake"),
        ([SAVED, SAVED], facts("COMPLETING", restarts=1), False, 0, "preempted"),
        ([None, None], facts("PENDING", restarts=1), False, 137, "preempted"),
        ([SAVED, SAVED], facts("COMPLETING"), False, 0, "cancelled"),
        ([SAVED, SAVED], facts("CANCELLED"), False, 0, "cancelled"),
        ([SAVED, SAVED], facts(preempted=True, left_s=50), False, 0, "preempted"),
        ([None, SAVED], facts(preempted=True), False, 15, "preempted"),
        ([SAVED, SAVED], facts(left_s=119), False, 0, "time limit"),
        ([SAVED, SAVED], facts(left_s=3600), False, 0, "preempted"),  # somebody sent a signal
        ([SAVED, SAVED], None, False, 0, "preempted"),
        ([SAVED, SAVED], facts(), True, 0, "stopped"),
        ([SAVED, CRASH], facts(), False, 1, "crashed"),
        ([SAVED, None], facts(), False, 137, "crashed"),
        ([SAVED, CRASH], facts(left_s=100), False, 1, "crashed"),
    ],
)
def test_the_cause_of_an_end_is_told_from_what_slurm_and_the_nodes_say(
    ends: list[NodeEnd | None], found: JobFacts | None, stop: bool, srun_code: int, why: str
) -> None:
    told, _ = why_ended(ends, found, restart=0, margin_s=60, stop=stop, srun_code=srun_code, now=NOW)
    assert told == why


def test_a_crash_is_told_with_the_last_line_of_its_traceback() -> None:
    _, message = why_ended([CRASH], facts(), restart=0, margin_s=60, stop=False, srun_code=1, now=NOW)
    assert message == "rank 1 ended with code 1: KeyError: 'x'"


def attempts(*causes: Why) -> list[Attempt]:
    return [Attempt(number, why, "so it was", f"step_{number}") for number, why in enumerate(causes)]


@pytest.mark.parametrize(
    ("causes", "goes_on"),
    [
        (("preempted", "preempted"), True),
        (("preempted", "preempted", "preempted"), False),
        (("time limit",), True),
        (("time limit", "time limit"), False),
        (("crashed",), True),
        (("crashed", "crashed"), False),
        (("crashed", "node lost"), False),
        (("crashed", "preempted", "time limit", "preempted"), True),
        (("finished",), False),
        (("cancelled",), False),
        (("stopped",), False),
        (("mistake",), False),
    ],
)
def test_each_cause_has_a_budget_of_its_own(causes: tuple[Why, ...], goes_on: bool) -> None:
    verdict = judge(attempts(*causes), BUDGETS, saves=True)
    assert (verdict is None) == goes_on
    if verdict is not None:
        assert (verdict.code == 0) == (causes[-1] == "finished")
        assert "\n" not in verdict.message


def test_time_limits_that_leave_no_new_checkpoint_end_the_job_though_the_budget_lasts() -> None:
    stuck = [Attempt(0, "time limit", "late", "step_1"), Attempt(1, "time limit", "late", "step_1")]
    budgets = BUDGETS | {"max_timeouts": 100}
    verdict = judge(stuck, budgets, saves=True)
    assert verdict is not None and "launch.signal_margin_s" in verdict.message
    assert judge(stuck, budgets, saves=False) is None  # a cache build saves none
    assert judge([stuck[0], Attempt(1, "time limit", "late", "step_2")], budgets, saves=True) is None


class Slurm:
    """Replaces SLURM's commands for the batch script: answers them, and records the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: JobFacts | None, states: list[str]) -> None:
        self.asked: list[str] = []
        monkeypatch.setattr(slurm_commands, "job_facts", lambda job: found)
        monkeypatch.setattr(slurm_commands, "final_states", lambda job: states)
        monkeypatch.setattr(slurm_commands, "waiting_for", lambda job: ["8"])
        monkeypatch.setattr(slurm_commands, "requeue", lambda job: self.asked.append(f"requeue {job}"))
        monkeypatch.setattr(slurm_commands, "cancel", lambda job: self.asked.append(f"cancel {job}"))


@pytest.fixture
def submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submission:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    launch = {"nodes": 1, "signal_margin_s": 60, **BUDGETS}
    return Submission.create(tmp_path, kind="train", resolved={"launch": launch})


def test_a_job_that_slurm_has_requeued_is_not_requeued_again(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Slurm(monkeypatch, facts("COMPLETING", restarts=1), [])
    submission.set_ended(SAVED, array=0, restart=0, node=0)
    after(submission.folder, 0)
    assert slurm.asked == [] and submission.verdicts() == {}


def test_a_job_that_must_requeue_itself_does_so_once(submission: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Slurm(monkeypatch, facts(preempted=True), [])
    submission.set_ended(SAVED, array=0, restart=0, node=0)
    after(submission.folder, 0)
    assert slurm.asked == ["requeue 7"] and submission.verdicts() == {}


def test_a_job_beyond_its_budget_is_taken_out_of_the_queue_and_names_who_waits_for_it(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Slurm(monkeypatch, facts("COMPLETING", restarts=3), [])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for attempt in attempts("preempted", "preempted"):
        submission.add_attempt(attempt, array=0)
    submission.set_ended(SAVED, array=0, restart=2, node=0)
    assert after(submission.folder, 0) != 0
    assert slurm.asked == ["cancel 7"]
    message = submission.verdicts()[0].message
    assert "launch.max_preemptions is 2" in message and "scancel 8" in message


@pytest.mark.parametrize(
    ("states", "causes", "over"),
    [
        (["NODE_FAIL", "RUNNING"], ["node lost"], False),
        (["PREEMPTED", "NODE_FAIL", "NODE_FAIL", "RUNNING"], ["preempted", "node lost", "node lost"], True),
        ([], ["node lost"], False),
    ],
)
def test_attempts_that_were_killed_outright_are_counted_before_the_next_one(
    states: list[str], causes: list[str], over: bool, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slurm(monkeypatch, facts(), states)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(len(causes)))
    assert (before(submission.folder) == OVER_EXIT_CODE) == over
    assert [attempt.why for attempt in submission.attempts(array=0)] == causes
    assert bool(submission.verdicts()) == over
