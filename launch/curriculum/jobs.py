"""The stages of a curriculum as SLURM jobs, each submitted exactly once, even if the submitting process is killed.

    OUT/stages/NAME.json   the job name under which the stage is submitted; the job's id and files

The record is written before sbatch runs. While it has no id, the job is found by its unique name: in
the queue, then in the accounting.
"""

import json
import secrets
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from flowmask.launch.curriculum.stages import Stage
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm import resources, snapshot
from flowmask.launch.slurm.submission import Submission
from flowmask.models.errors import ConfigError
from flowmask.models.files import write_atomically
from flowmask.models.stored.sealed import parse_json

FOLDER = "stages"
SBATCH_S = 60.0
NEVER = "DependencyNeverSatisfied"


@dataclass(frozen=True)
class Record:
    """A submission of a stage; `job_id` is None while it is unknown whether SLURM has accepted it."""

    job_name: str
    folder: str
    job_id: str | None = None

    @property
    def submission(self) -> Submission:
        return Submission(Path(self.folder))


def read(out: Path, stage: str) -> Record | None:
    """The record of a stage's job; None if it was never submitted."""
    path = out / FOLDER / f"{stage}.json"
    try:
        return Record(**parse_json(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} can't be read ({error}); check in squeue whether its job exists, then remove the file"
        ) from error


def submit(out: Path, stage: Stage, *, after: list[str]) -> str:
    """Submit a stage that starts when the jobs `after` have succeeded; returns its job id."""
    from flowmask.launch.slurm import executor as slurm

    name = f"flowmask-{stage.name}-{secrets.token_hex(4)}"
    submission = Submission.create(stage.out, kind=stage.job.KIND, resolved=stage.job.model_dump(mode="json"))
    code = snapshot.freeze(submission.folder)
    record = Record(name, str(submission.folder))
    _write(out, stage.name, record)
    launch, hidden = resources.settle(stage.job).launch, stage.job.hidden()
    if after:
        own = launch.sbatch_args.get("dependency")
        depends = ",".join([f"afterok:{':'.join(after)}", *([own] if isinstance(own, str) else [])])
        args = {**launch.sbatch_args, "dependency": depends, "kill-on-invalid-dep": "yes"}
        launch = launch.model_copy(update={"sbatch_args": args})
    job_id = slurm.submit(submission, launch, name=name, code=code, hidden=hidden)
    _write(out, stage.name, replace(record, job_id=job_id))
    return job_id


def known_job(out: Path, stage: Stage) -> str | None:
    """The id of the stage's last job, also if its submitter was killed before it could save the id."""
    from flowmask.launch.slurm import executor as slurm

    record = read(out, stage.name)
    if record is None or record.job_id is not None:
        return record.job_id if record else None
    if (record.submission.folder / "slurm.json").exists():
        job_id: str | None = record.submission.slurm()[0]
    else:
        _let_sbatch_end(record.submission.folder)
        job_id = slurm_commands.job_named(record.job_name)
    if job_id is not None:
        slurm.adopt(record.submission, job_id=job_id, array=stage.job.launch.array)
        _write(out, stage.name, replace(record, job_id=job_id))
    return job_id


def _let_sbatch_end(folder: Path) -> None:
    """Wait for an sbatch that outlived its killed submitter."""
    until = time.monotonic() + SBATCH_S
    while any(_is_sbatch(process, folder) for process in psutil.process_iter()):
        if time.monotonic() > until:
            raise ConfigError(f"an sbatch for {folder} is still waiting for SLURM; try again when it has ended")
        time.sleep(0.2)


def _is_sbatch(process: psutil.Process, folder: Path) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return any(Path(word).name == "sbatch" for word in words[:2]) and any(str(folder) in word for word in words)


def _write(out: Path, stage: str, record: Record) -> None:
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    write_atomically(out / FOLDER / f"{stage}.json", json.dumps(asdict(record), indent=1))
