"""SLURM's own commands: the state of a job, and the actions on it. Needs no submitit.

A job id may come from a file that another user wrote. So it must be a number, and a job is ended or signalled only if
SLURM says that this user submitted it from that folder.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flowmask.models.errors import ConfigError
from flowmask.models.process import is_of_a_group

TIMEOUT_S = 60.0
_NO_CONTROLLER = re.compile(r"Could not establish a configuration source|Unable to contact slurm controller[^\n]*")
_OF_SLURM = re.compile(r"(?:SLURMD?|SBATCH|SALLOC|SRUN|SCANCEL|SCONTROL|SQUEUE|SACCT|SINFO|SPANK)_\w+")
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK_SOCKET")  # which, who
_OF_AN_ALLOCATION = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


class NoPartitionError(ConfigError):
    """SLURM has no partition of this name, or no default one."""


def environment() -> dict[str, str]:
    """This process's variables without those of the job it may be in and without defaults for SLURM's commands.

    sbatch passes its variables to the job: SLURM_ARRAY_TASK_ID, SLURM_RESTART_COUNT or SLURM_MEM_PER_CPU of this job
    would apply to the next one. Options such as SBATCH_PARTITION or SQUEUE_STATES would change the request.
    """
    inside = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if (name in _OF_THE_CLUSTER or not _OF_SLURM.fullmatch(name))
        and not is_of_a_group(name)
        and not (inside and name in _OF_AN_ALLOCATION)
    }


def ignored_options() -> list[str]:
    """Options of sbatch in the environment. FlowMask does not pass them on: only `launch` sets options."""
    return sorted(name for name in os.environ if name.startswith("SBATCH_"))


@contextmanager
def fresh_environment() -> Iterator[None]:
    """Inside the block, this process's variables are `environment()`."""
    before = dict(os.environ)
    kept = environment()
    try:
        os.environ.clear()
        os.environ.update(kept)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class JobFacts:
    """SLURM's facts about a job now. `ends` and `preempted` are None if SLURM gives no time."""

    state: str
    restarts: int
    ends: datetime | None
    preempted: datetime | None


def available() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Raises ConfigError if SLURM's commands are not installed."""
    if not available():
        raise ConfigError(
            "launch.cluster is slurm, but this machine has no sbatch; submit from a login node, "
            "look at the script with `flowmask submit --dry-run`, or use launch.cluster=local"
        )


def run(*command: str) -> str:
    """The output of a command. Raises ConfigError with SLURM's message if it fails."""
    done = _run(command)
    if done.returncode:
        said = done.stderr or done.stdout
        raise ConfigError(unreachable(said) or f"`{' '.join(command)}` failed: {' '.join(said.split())}")
    return done.stdout


def unreachable(said: str) -> str:
    """One line with the fix, if SLURM's message means that no controller answers; else empty."""
    found = _NO_CONTROLLER.search(said)
    return (found and f"no SLURM controller answers ({found[0]}): use a login node, or set SLURM_CONF") or ""


def partition(name: str | None) -> dict[str, str]:
    """Facts of `scontrol` about a partition; None: the default one. Raises NoPartitionError with the existing ones."""
    shown = _rows(run("scontrol", "show", "partition", "-o"))
    by_name = {facts["PartitionName"]: facts for facts in shown if "PartitionName" in facts}
    names = ", ".join(by_name)
    chosen = name or next((key for key, facts in by_name.items() if facts.get("Default") == "YES"), None)
    if chosen is None:
        raise NoPartitionError(f"launch.partition is not set and this cluster has no default; it has {names}")
    if chosen not in by_name:
        raise NoPartitionError(f"launch.partition is {chosen}; this cluster has {names}")
    return by_name[chosen]


def nodes_of(partition: str) -> list[dict[str, str]]:
    """Facts of `scontrol` about every node of a partition; empty if the cluster hides them."""
    shown = _rows(run("scontrol", "show", "node", "-o"))
    return [facts for facts in shown if partition in facts.get("Partitions", "").split(",")]


def job_facts(job_id: str) -> JobFacts | None:
    """`scontrol show job`; None for a job that SLURM has forgotten."""
    done = _run(("scontrol", "show", "job", "-o", _number(job_id)))
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", done.stdout.partition("\n")[0]))
    if done.returncode or "JobState" not in fields:
        return None
    return JobFacts(
        state=fields["JobState"],
        restarts=int(fields.get("Restarts", "0")),
        ends=_time(fields.get("EndTime", "")),
        preempted=_time(fields.get("PreemptTime", "")),
    )


def queued(job_id: str) -> dict[str, tuple[str, str]]:
    """State and pending reason of those tasks of a job that are in the queue, by `12` or `12_3`."""
    done = _run(("squeue", "--noheader", "--array", "--jobs", _number(job_id), "--format", "%i|%T|%r"))
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return {}
        raise ConfigError(f"squeue does not answer: {' '.join(done.stderr.split())}")
    rows = [line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2]
    return {row[0]: (row[1], row[2]) for row in rows}


def final_states(job_id: str) -> list[str]:
    """How every attempt of a job ended, from the accounting; empty if there is none or it does not answer."""
    command = ("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--format", "State")
    try:
        done = _run((*command, "--jobs", _number(job_id)))
    except ConfigError:
        return []
    return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]


def waiting_for(job_id: str) -> list[str]:
    """Jobs in the queue that start only after this one has succeeded."""
    done = _run(("squeue", "--noheader", "--states", "PENDING", "--format", "%i|%E"))
    rows = [line.partition("|") for line in done.stdout.splitlines()]
    return [job for job, _, dependency in rows if re.search(rf"afterok:{job_id}\b", dependency)]


def job_named(name: str) -> str | None:
    """The id of the one job of this name: from the queue, else from the accounting; None if SLURM knows none."""
    found = run("squeue", "--noheader", "--name", name, "--format", "%A").split()
    if not found:
        words = ("sacct", "--noheader", "--parsable2", "--allocations", "--starttime", "now-30days")
        done = _run((*words, "--format", "JobID", "--name", name))
        found = done.stdout.split()
    return found[0].partition("_")[0] if found else None


def requeue(job_id: str) -> None:
    """Put a running job back into the queue; SLURM ends its processes."""
    run("scontrol", "requeue", _number(job_id))


def cancel_waiting(job_id: str, *, logs: Path) -> None:
    """Cancel the tasks of a job that have not started. logs: folder of the script and logs of its submission."""
    _scancel(job_id, "--state=PENDING", logs=logs)


def ask_to_stop(job_id: str, *, logs: Path) -> None:
    """Send the save signal to every process of a running job except the batch script."""
    _scancel(job_id, "--signal=USR2", logs=logs)


def cancel(job_id: str, *, logs: Path | None = None) -> None:
    """End a job for good. logs: as above; None: the job that this process is in."""
    if logs is None:
        assert job_id == os.environ.get("SLURM_JOB_ID"), "any other job comes from a file"
        run("scancel", _number(job_id))
    else:
        _scancel(job_id, logs=logs)


def _scancel(job_id: str, *options: str, logs: Path) -> None:
    """Act on a job that is certainly this user's and of this folder, or gone. Raises ConfigError for any other."""
    done = _run(("scontrol", "show", "job", "-o", _number(job_id)))
    shown = [line for line in done.stdout.splitlines() if "JobId=" in line]
    if done.returncode or not shown:
        return  # SLURM has forgotten it
    for line in shown:
        user = re.search(r"(?:^|\s)UserId=\S*\((\d+)\)", line)
        paths = [found[1] for key in ("Command", "StdOut") if (found := re.search(rf"\s{key}=(.*?)(?= \w+=|$)", line))]
        if (
            user is None
            or int(user[1]) != os.getuid()
            or logs.resolve() not in (Path(p).parent.resolve() for p in paths)
        ):
            raise ConfigError(
                f"job {job_id}, which {logs.parent} names, belongs to another folder or user, and was left alone: see "
                f"`scontrol show job {job_id}`; to end it, use scancel"
            )
    run("scancel", *options, job_id)


def _number(job_id: str) -> str:
    """A job id, or several with commas. Raises ConfigError for any other text, which SLURM could misread."""
    if not isinstance(job_id, str) or not re.fullmatch(r"\d+(?:_\d+)?(?:,\d+(?:_\d+)?)*", job_id, re.ASCII):
        raise ConfigError(f"the job is {job_id!r}, which is not a SLURM job id; correct the slurm.json of that run")
    return job_id


def _rows(shown: str) -> list[dict[str, str]]:
    return [dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line)) for line in shown.splitlines() if line.strip()]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())
    except FileNotFoundError as error:
        raise ConfigError(f"{command[0]} is not installed on this machine; SLURM's commands are needed") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"`{' '.join(command)}` did not answer in {TIMEOUT_S:.0f} s") from error


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
