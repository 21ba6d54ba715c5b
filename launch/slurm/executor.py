"""Hands a job to SLURM through submitit, which only this file imports.

One task per node starts the ranks of that node (task.py); when all have ended, the batch script itself decides
whether the job is over or goes back into the queue (requeue.py). submitit's own handlers are replaced: its
checkpoint would run inside a signal handler, on one rank only.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from flowmask.launch.launch_config import LaunchConfig
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm import snapshot, task
from flowmask.launch.slurm.submission import Submission
from flowmask.models.errors import ConfigError
from flowmask.models.files import write_atomically
from flowmask.models.process import OVER_EXIT_CODE, REQUEUE_EXIT_CODE, python_module
from flowmask.models.safe.secrets import lacks, revealed


class _Executor(SlurmExecutor):
    """submitit's executor, which can also write a script on a machine without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


class NotTakenError(ConfigError):
    """SLURM has certainly no job of this submission. A request that timed out may have become one."""


def submit(
    submission: Submission, launch: LaunchConfig, *, name: str, code: Path, hidden: Mapping[str, str] | None = None
) -> str:
    """Submit to SLURM; returns the job id. Raises NotTakenError with SLURM's message, ConfigError if it may have a job.

    launch: as settled by resources.py. code: folder of the packages that the job runs, first on its PYTHONPATH.
    hidden: `Job.hidden`. Only the script holds these values and secrets of launch; only this user can read it.
    """
    slurm_commands.require()
    executor = _executor(submission, whole(launch), name=name, code=code, hidden=hidden)
    everybodys = submission.logs.stat().st_mode & 0o777
    submission.logs.chmod(0o700)  # until the script is private; submitit writes it with default permissions
    try:
        with slurm_commands.fresh_environment(), executor.batch():  # several jobs in a batch become an array
            jobs = [executor.submit(task.run, str(submission.folder)) for _ in range(launch.array)]
    except (FailedJobError, FailedSubmissionError) as error:
        said = slurm_commands.unreachable(str(error)) or f"SLURM refused the job: {_last_line(error)}"
        taken = isinstance(error, FailedSubmissionError) or "timed out" in str(error).lower()
        raise (ConfigError if taken else NotTakenError)(said) from error
    finally:
        for path in submission.logs.rglob("*.sh"):
            path.chmod(0o600)
        submission.logs.chmod(everybodys)
    job_id = str(jobs[0].job_id).partition("_")[0]
    submission.set_slurm(job_id=job_id, array=launch.array)
    return job_id


def adopt(submission: Submission, *, job_id: str, array: int) -> None:
    """Finish for a submitter that was killed after sbatch: each job finds its task by its own id.

    All tasks of a submission are the same call, so any of its pickles can be copied.
    """
    pickles = sorted(submission.logs.glob("*.pkl"))
    for task_id in [job_id] if array == 1 else [f"{job_id}_{number}" for number in range(array)]:
        path = submission.logs / f"{task_id}_submitted.pkl"
        if not path.exists() and pickles:
            write_atomically(path, pickles[0].read_bytes())
    submission.set_slurm(job_id=job_id, array=array)


def script(out: Path, launch: LaunchConfig, *, name: str) -> str:
    """The sbatch script of the next submission to `out`; needs no SLURM and writes nothing.

    launch: `whole`, or `shown` for display. The hidden variables of the job are left out.
    """
    planned = Submission.planned(out)
    executor = _executor(planned, launch, name=name, code=planned.folder / snapshot.CODE)
    if launch.array > 1:
        executor.parameters["map_count"] = launch.array
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry"))


def whole(launch: LaunchConfig) -> LaunchConfig:
    """`launch` with `${oc.env:...}` filled in. Raises ConfigError for a saved copy, which lacks the values."""

    def fill(key: str, text: str) -> str:
        if lacks(text):
            raise ConfigError(
                f"launch.{key} holds {text!r}, from a saved copy, which stores no values of variables: set "
                f"launch.{key} again (with ${{oc.env:NAME}} a copy can be reused)"
            )
        return revealed(text, key=f"launch.{key}")

    return launch.model_copy(
        update={
            "setup": tuple(fill("setup", line) for line in launch.setup),
            "srun_args": tuple(fill("srun_args", word) for word in launch.srun_args),
            "sbatch_args": {
                name: word if word is True else fill("sbatch_args", word) for name, word in launch.sbatch_args.items()
            },
        }
    )


def shown(launch: LaunchConfig) -> LaunchConfig:
    """`launch` for display: in its saved form, without the escapes of the file."""
    saved = launch.model_dump_json().replace("\\\\${", "${")
    return LaunchConfig.model_validate_json(saved)


def _executor(
    submission: Submission, launch: LaunchConfig, *, name: str, code: Path, hidden: Mapping[str, str] | None = None
) -> SlurmExecutor:
    executor, cpus = _Executor(submission.logs), launch.cpus_per_node
    assert cpus is not None, "flowmask.launch.slurm.resources settles the request"
    values: dict[str, Any] = {
        "job_name": name,
        "nodes": launch.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "gpus_per_node": launch.gpus_per_node or None,
        "mem": None if launch.mem_gb is None else f"{round(launch.mem_gb * 1024)}M",
        "time": launch.time_min,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "array_parallelism": launch.array_parallel or launch.array,
        "signal_delay_s": launch.signal_margin_s,
        "wckey": None,
        "additional_parameters": {"requeue": True, **launch.sbatch_args},
        "setup": _setup(submission, launch, code, hidden or {}),
        "teardown": [_then("flowmask.launch.slurm.requeue", submission.folder, "$?")],
        # a node that fails ends the others, which would wait for it; srun does not take over sbatch's CPUs
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}", *launch.srun_args],
    }
    executor.update_parameters(
        **{key: value for key, value in values.items() if value is not None or key in ("time", "wckey")}
    )
    return executor


def _setup(submission: Submission, launch: LaunchConfig, code: Path, hidden: Mapping[str, str]) -> list[str]:
    before = _then("flowmask.launch.slurm.requeue", submission.folder)
    return [
        *launch.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in hidden.items()),
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # the folder it was submitted in is often a checkout that goes on changing",
        f'[ -z "$SLURM_RESTART_COUNT" ] || {before} || [ $? != {OVER_EXIT_CODE} ] || exit {REQUEUE_EXIT_CODE}',
        "trap : TERM  # the last line below must be reached when SLURM takes the nodes back",
    ]


def _then(module: str, folder: Path, *words: str) -> str:
    return " ".join([shlex.join(python_module(module, folder)), *words])


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
