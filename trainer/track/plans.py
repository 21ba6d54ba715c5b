"""The plan of an MLflow run: of a training at each of its starts, and of the run above those of a curriculum.

What begins without a checkpoint, and a copied folder, is a new MLflow run; all else goes on in its own.
"""

import getpass
import os
import platform
import shlex
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmask.models.safe.secrets import masked_uri
from flowmask.trainer.state.provenance import UNKNOWN, git_commit
from flowmask.trainer.track import database, spool
from flowmask.trainer.track.spool import DatasetFacts, TrackingPlan

if TYPE_CHECKING:
    from flowmask.trainer.config import RunConfig

_DIRTY = "-dirty"
_LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` serves
_TRAINING = "?workflowType=machine_learning"  # without it the page is made for language models


@dataclass(frozen=True)
class RunFacts:
    """What MLflow is told of a run beside its numbers (facts.py). params: None where a key is not used."""

    params: Mapping[str, Any]
    tags: Mapping[str, str]
    datasets: tuple[DatasetFacts, ...] = ()


def plan_of_run(
    config: "RunConfig", facts: RunFacts, *, resumed: bool, run_id: str | None, warn: Callable[[str], None]
) -> TrackingPlan:
    """The plan of this start of a training. run_id: the MLflow run that a checkpoint names."""
    tracking, out = config.tracking, config.out
    known, other = spool.read_plan(out), spool.copied_from(out)
    if other is not None:
        warn(f"{out} is a copy of {other}, which is still there: from here on it is a new MLflow run")
    new = not resumed or other is not None
    if new:
        spool.forget(out)
    earlier = None if new else known
    params = {key: str(value) for key, value in facts.params.items() if value is not None}
    unset = {key for key in (earlier.params if earlier else ()) if facts.params.get(key, "") is None}
    return TrackingPlan(
        key=uuid.uuid4().hex if new else spool.key_of(out),
        uri=server_for(tracking.uri, out, earlier=earlier),
        experiment=tracking.experiment,
        **_name_and_start(earlier, asked=tracking.run_name, called=tracking.stage or out.resolve().name),
        params=params | dict.fromkeys(unset, str(None)),
        tags=dict(facts.tags),
        datasets=facts.datasets,
        every_steps=config.train.log_every_steps,
        end_timeout_s=tracking.end_timeout_s,
        run_id=None if new or known is not None else run_id,
        asked=tracking.uri,
        folder=str(out.resolve()),
        parent="" if tracking.parent is None else str(tracking.parent.resolve()),
    )


def plan_of_group(folder: Path, first: "RunConfig", *, name: str, tags: Mapping[str, str]) -> TrackingPlan:
    """The plan of the run above others, which is remembered in `folder`: at the server of the `first` of them."""
    copied, tracking = spool.copied_from(folder) is not None, first.tracking
    if copied:
        spool.forget(folder)
    earlier = None if copied else spool.read_plan(folder)
    return TrackingPlan(
        key=uuid.uuid4().hex if copied else spool.key_of(folder),
        uri=server_for(tracking.uri, first.out, earlier=earlier),
        experiment=tracking.experiment,
        **_name_and_start(earlier, asked=None, called=name),
        tags=dict(tags),
        end_timeout_s=tracking.end_timeout_s,
        asked=tracking.uri,
        folder=str(folder.resolve()),
    )


def _name_and_start(earlier: TrackingPlan | None, *, asked: str | None, called: str) -> dict[str, Any]:
    """Both stay what they were at the first start; runs of one name are told apart by when they started."""
    if earlier is not None:
        return {"name": earlier.name, "started_ms": earlier.started_ms}
    now_s = time.time()
    started = time.strftime("%m%d-%H%M%S", time.localtime(now_s))
    return {"name": asked or f"{called} {started}", "started_ms": int(now_s * 1000)}


def server_for(asked: str | None, out: Path, *, earlier: TrackingPlan | None) -> str:
    """The server that a config means. A database that it names by a relative path, or not at all, is the first start's.

    So it is the same one from any working folder, and after the run was moved; unless it is gone.
    """
    uri = default_uri(out) if asked is None else database.absolute(asked)
    if earlier is None or earlier.asked != asked or (asked is not None and uri == asked):
        return uri
    before = database.file_of(earlier.uri)
    return earlier.uri if before is not None and before.exists() else uri


def default_uri(run_folder: Path) -> str:
    """A SQLite database beside the run folder, shared by the runs that lie there."""
    return f"sqlite:///{run_folder.resolve().parent / 'mlflow.db'}"


def common_tags(command: str) -> dict[str, str]:
    """Tags of whatever this process tracks: user, command, commit, machine, SLURM's job."""
    commit = git_commit()
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": command,
        "mlflow.source.type": "LOCAL",
        "host": platform.node(),
    }
    if commit != UNKNOWN:
        tags["mlflow.source.git.commit"] = commit.removesuffix(_DIRTY)
        tags["mlflow.source.git.dirty"] = str(commit.endswith(_DIRTY)).lower()
    if job := os.environ.get("SLURM_JOB_ID"):
        tags["slurm_job"] = job
    return tags


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return str(os.getuid())


def page_of(uri: str, *, experiment_id: str | None, run_id: str | None = None) -> str:
    """The page of a run, or of its experiment's runs; of a database with the command that serves it.

    Empty where the server is of a kind whose pages have other addresses, or has not got the run.
    """
    if experiment_id is None:
        return ""
    run = f"/{run_id}" if run_id is not None else ""
    page = f"/#/experiments/{experiment_id}/runs{run}{_TRAINING}"
    uri = masked_uri(uri)
    if uri.startswith(("http://", "https://")):
        return uri.partition("?")[0].rstrip("/") + page
    if uri.startswith("databricks"):
        return ""
    return f"{serving(uri)}, then open {_LOCAL}{page}"


def serving(uri: str) -> str:
    """The command that serves the pages of a database."""
    return f"`mlflow ui --backend-store-uri {shlex.quote(masked_uri(database.absolute(uri)))}`"
