"""The checkpoints of a run by name: finds the complete ones and the newest. Reads no tensor and imports no torch."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from flowmask.models.errors import CheckpointError
from flowmask.trainer.state.run_folder import CHECKPOINTS

STATE = "state.json"  # the last written file of a checkpoint
_STEP = re.compile(r"step_(\d{8,})")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a complete checkpoint: one step of a run."""
    return (path / STATE).is_file()


def is_run(path: Path) -> bool:
    """Whether a folder is a run or one of its steps."""
    return (path / CHECKPOINTS).is_dir() or is_checkpoint(path)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run's `checkpoints/`, newest first."""
    found = [path for path in folder.glob("step_*") if _STEP.fullmatch(path.name) and is_checkpoint(path)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def newest(source: Path) -> Path | None:
    """The newest complete checkpoint of a run, or the step itself if it is one; None if there is none."""
    return source if is_checkpoint(source) else next(iter(complete(source / CHECKPOINTS)), None)


def newest_of(checkpoints: Sequence[Path], *, damage: Callable[[Path], str | None]) -> Path | None:
    """The first undamaged checkpoint, as a resume uses it.

    Raises CheckpointError with the faults if all are damaged.
    """
    problems = []
    for checkpoint in checkpoints:
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        problems.append(problem)
    if problems:
        raise CheckpointError("; ".join(problems))
    return None
