"""One MLflow run above others: of a curriculum or a study, with its trainings as children.

It is remembered in a folder of its own. Whoever starts the group plans the run; the first training that reaches the
server makes it there, and each training puts itself below it.
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
    """Plan the run above the trainings that are tracked; nothing where none is. A folder that refuses ends nothing."""
    first = next((one for one in trainings if one.tracking.enabled), None)
    if first is None:
        return
    try:
        RunFolder(folder, patience_s=0).close()  # makes it one of ours
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
    """Say at the server how the group has ended, if one of its `runs` was tracked; says where to look, or what is left.

    step: at which `metrics` were measured. Whatever is wrong with MLflow ends nothing.
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
