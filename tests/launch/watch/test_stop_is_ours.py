"""`flowmask stop` acts only on a process or job that provably belongs to the run, whatever the files name."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.watch.control import StopError, _signal, stop
from flowmask.models.errors import ConfigError
from flowmask.models.folders.locks import is_held_by
from flowmask.models.process import process_here

RUN = "exec 9>{lock}; flock 9; echo; exec sleep 600"


def holder(command: str) -> subprocess.Popen[bytes]:
    """A process that has run its commands and now sleeps."""
    process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_only_the_process_that_holds_the_lock_is_signalled(tmp_path: Path, processes: Any) -> None:
    lock = tmp_path / ".lock"
    ours = holder(RUN.format(lock=lock))
    shares = holder(f"exec 9<{lock}; echo; exec sleep 600")  # has the file open, without a lock
    other = holder("echo; exec sleep 600")
    processes += [ours, shares, other]
    assert [is_held_by(each.pid, lock) for each in processes] == [True, False, False]
    for wrong in (shares, other):
        assert not _signal(process_here(wrong.pid), tmp_path, lock=lock)
        assert wrong.poll() is None
    earlier = process_here(ours.pid).model_copy(update={"started": process_here(ours.pid).started - 1})
    assert _signal(earlier, tmp_path, lock=lock) and ours.poll() is None  # a process that is gone
    assert _signal(process_here(ours.pid), tmp_path, lock=lock)
    assert ours.wait(timeout=20) == -15


@pytest.mark.parametrize("how", ["link", "hard link", "folder", "absent"])
def test_a_lock_that_only_leads_to_another_runs_is_no_proof(how: str, tmp_path: Path, processes: Any) -> None:
    theirs, lock = tmp_path / "theirs", tmp_path / ".lock"
    process = holder(RUN.format(lock=theirs))
    processes.append(process)
    match how:
        case "link":
            lock.symlink_to(theirs)
        case "hard link":
            os.link(theirs, lock)
        case "folder":
            lock.mkdir()
    assert not is_held_by(process.pid, lock)


@pytest.mark.parametrize("pid", [1, os.getpid(), os.getppid()], ids=["init", "itself", "parent"])
def test_a_folder_that_names_another_process_is_refused_in_one_line(
    pid: int, tmp_path: Path, processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third process holds the folder's lock, so that the run seems to be active."""
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    processes.append(holder(RUN.format(lock=out / ".lock")))
    owner = process_here(pid).model_dump()
    (out / ".owner.json").write_text(json.dumps({"owner": owner, "launcher": owner, "number": 1}))
    monkeypatch.setattr("signal.pidfd_send_signal", lambda *_: pytest.fail("signalled"))
    with pytest.raises(StopError, match="does not hold its lock") as refused:
        stop(out, timeout_s=1, wait=True)
    assert "\n" not in str(refused.value)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands: scontrol prints the file `shown`; every call is recorded in `calls`."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("scontrol", "scancel", "squeue", "sacct"):
        shows = f"[ -s {bin_}/shown ] && cat {bin_}/shown" if name == "scontrol" else ""
        (bin_ / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{bin_}/calls\n{shows}\n')
        (bin_ / name).chmod(0o755)
    (bin_ / "calls").touch()
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    return bin_


def job(logs: Path, *, uid: int | None = None, number: int = 12) -> str:
    uid = os.getuid() if uid is None else uid
    return (
        f"JobId={number} JobName=flowmask-train-a UserId=me({uid}) GroupId=me({uid}) JobState=RUNNING Restarts=0 "
        f"Command={logs}/.submission_file_1.sh WorkDir=/w StdErr={logs}/{number}_0_log.err StdIn=/dev/null "
        f"StdOut={logs}/{number}_0_log.out TresPerTask=cpu=1\n"
    )


@pytest.mark.parametrize(
    "number",
    ["--user=me", "-u me", "12 --user=me", "12\n", "", "12;x", "12_", "_1", "12,--me", "*", "１２", 12, None, ["12"]],
)
def test_what_is_no_number_reaches_no_command_of_slurm(number: Any, slurm: Path, tmp_path: Path) -> None:
    calls = (
        lambda: slurm_commands.cancel(number, logs=tmp_path),
        lambda: slurm_commands.cancel_waiting(number, logs=tmp_path),
        lambda: slurm_commands.ask_to_stop(number, logs=tmp_path),
        lambda: slurm_commands.queued(number),
        lambda: slurm_commands.job_facts(number),
        lambda: slurm_commands.requeue(number),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="not a SLURM job id"):
            call()
    assert (slurm / "calls").read_text() == ""


@pytest.mark.parametrize("whose", ["another user's", "another folder's", "one of an array", "says nothing"])
def test_a_job_that_is_not_of_this_folder_is_left_alone(whose: str, slurm: Path, tmp_path: Path) -> None:
    logs = tmp_path / "run with a space" / "launch" / "0001" / "logs"
    logs.mkdir(parents=True)
    shown = {
        "another user's": job(logs, uid=os.getuid() + 1),
        "another folder's": job(tmp_path / "other" / "logs"),
        "one of an array": job(logs) + job(tmp_path / "other" / "logs", number=13),
        "says nothing": "JobId=12 JobState=RUNNING\n",
    }[whose]
    (slurm / "shown").write_text(shown)
    with pytest.raises(ConfigError, match="belongs to another folder or user"):
        slurm_commands.cancel("12", logs=logs)
    assert "scancel" not in (slurm / "calls").read_text()
    (slurm / "shown").write_text(job(logs) + job(logs, number=13))
    slurm_commands.cancel("12_3", logs=logs)
    assert (slurm / "calls").read_text().splitlines()[-1] == "scancel 12_3"


def test_a_job_that_slurm_has_forgotten_is_not_cancelled(slurm: Path, tmp_path: Path) -> None:
    slurm_commands.cancel("12", logs=tmp_path)
    assert "scancel" not in (slurm / "calls").read_text()
