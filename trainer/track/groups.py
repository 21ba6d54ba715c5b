"""One MLflow run for a curriculum or a study, with its trainings as child runs.

Its plan is stored in a folder. The command that starts the group plans the run. The first training that reaches the
server makes the run there, and each training makes itself a child of it.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowmask.models.errors import UserError
from flowmask.trainer.state.run_folder import RunFolder
from flowmask.trainer.track import spool
from flowmask.trainer.track.plans import common_tags, plan_of_group
from flowmask.trainer.track.spool import Status
from flowmask.trainer.track.tracking import replay, where_to_look

if TYPE_CHECKING:
    from flowmask.trainer.config import RunConfig


def begin_group(
    folder: Path, trainings: Sequence["RunConfig"], *, name: str, command: str, say: Callable[[str], None]
) -> None:
    """Plan the parent run of the tracked trainings; does nothing if none is tracked. A faulty folder is no error."""
    first = next((one for one in trainings if one.tracking.enabled), None)
    if first is None:
        return
    try:
        RunFolder(folder, patience_s=0).close()  # marks it as one of FlowMask's folders
        spool.write_plan(folder, plan_of_group(folder, first, name=name, tags=common_tags(command)))
    except (UserError, OSError) as error:
        say(f"MLflow: {error}; no run stands above those of the trainings")


def end_group(
    folder: Path,
    runs: Iterable[Path],
    status: Status,
    *,
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
    artifacts: Sequence[Path] = (),
    say: Callable[[str], None],
) -> None:
    """Send the end of the group if one of its `runs` was tracked; reports its page, or the command for the rest.

    step: the step of `metrics`. A fault of MLflow ends nothing.
    """
    plan = spool.read_plan(folder)
    plans = [found for run in runs if (found := spool.read_plan(run)) is not None and spool.is_plan_ours(run, found)]
    if plan is None or not plans:
        return
    children = tuple(one.key for one in plans if one.uri == plan.uri)
    try:
        ended = {"status": status, "ended_ms": int(time.time() * 1000), "children": children}
        spool.write_plan(folder, plan.model_copy(update=ended))
        if metrics:
            spool.add_metrics(folder, step, metrics)
        for path in artifacts:
            spool.add_artifact(folder, path, to=None)
        done = replay(folder, timeout_s=plan.end_timeout_s, warn=say)
    except (UserError, OSError) as error:
        say(f"MLflow: {error}")
        done = False
    say(f"MLflow: {where_to_look(folder)}" if done else f"`flowmask track {folder}` sends MLflow the rest")
