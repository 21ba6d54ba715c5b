"""Sends a job to SLURM: freezes it in OUT/launch/NNNN, submits it, and waits for it if asked to."""

from rich.console import Console

from launch import slurm_commands
from launch.config import CacheJob, EvaluateJob, TrainJob
from launch.snapshot import freeze
from launch.submission import Submission

INTERRUPTED = 130  # the shell's code for ^C
console = Console(stderr=True, soft_wrap=True, highlight=False)


def to_slurm(kind: str, job: CacheJob | TrainJob | EvaluateJob, *, wait: bool) -> int:
    """Submit a job; 0 once it is in the queue or, with `wait`, once it is done.

    Raises UserError with the job's own reason when it ends otherwise. ^C leaves it running; then 130.
    """
    from launch import slurm
    from launch import wait as waiting

    slurm_commands.require()
    submission = Submission.create(job.out, kind=kind, resolved=job.model_dump(mode="json"))
    code = freeze(submission.folder)
    job_id = slurm.submit(submission, job.launch, name=_name(kind, job), code=code)
    console.print(f"submitted job {job_id}; its logs: {submission.logs}", markup=False)
    if not wait:
        return 0
    try:
        return waiting.wait(submission)
    except KeyboardInterrupt:
        waiting.say_left(submission)
        return INTERRUPTED


def _name(kind: str, job: CacheJob | TrainJob | EvaluateJob) -> str:
    """What the queue calls the job."""
    return f"flowmask-{kind}-{job.out.resolve().name}"
