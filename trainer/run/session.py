"""What one start of a run has open, and the order in which it is opened and checked.

What a person did wrong is found before a model is built, by all ranks together, so that no rank waits for one
that has given up.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flowmask.data_pipeline.plan.leaks import refuse_evaluation
from flowmask.data_pipeline.read.batches import Reader, open_reader
from flowmask.data_pipeline.read.mixture import MixtureReader
from flowmask.models.errors import CheckpointError, UserError
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig, accumulation_steps, in_todays_terms
from flowmask.trainer.state.checkpoint import read_state
from flowmask.trainer.state.owner import note_start
from flowmask.trainer.state.run_folder import CHECKPOINTS, LOG, RunFolder, plain, refuse_differences
from flowmask.trainer.state.saving import Checkpoints
from flowmask.trainer.track.log import RunLog
from flowmask.trainer.track.tracking import Tracker

T = TypeVar("T")


@dataclass
class Session:
    """What one start of a run has open. `folder` is None above rank 0; `state` is what was saved."""

    config: RunConfig
    resolved: dict[str, Any]
    folder: RunFolder | None
    log: RunLog
    reader: Reader
    checkpoints: Checkpoints
    newest: Path | None
    state: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    tracker: Tracker | None = None


def together(call: Callable[[], T]) -> T:
    """This rank's result of `call`; if it is a UserError on any rank, that error on all of them."""
    value, error = None, None
    try:
        value = call()
    except UserError as raised:
        error = raised
    for failure in distributed.gather_objects(error):
        if failure is not None:
            raise failure
    return value  # type: ignore[return-value]


def open_session(config: RunConfig, resolved: Mapping[str, Any], stack: ExitStack) -> Session:
    """Lock the folder, open the cache, find the checkpoint to go on from, and check that they match."""
    leader = distributed.rank() == 0
    folder = together(lambda: RunFolder(config.out) if leader else None)
    if folder is not None:
        stack.callback(folder.close)
        note_start(config.out)
    log = RunLog(config.out / LOG if leader else None)
    stack.callback(log.close)
    reader = together(lambda: open_reader(config.data, check=leader, pin=distributed.device().type == "cuda"))
    stack.callback(reader.close)
    caches = reader.caches if isinstance(reader, MixtureReader) else [reader]
    together(lambda: refuse_evaluation((c.manifest for c in caches), where=config.data.caches))
    checkpoints = Checkpoints(
        config.out / CHECKPOINTS,
        config=config.checkpoint,
        warn=log.say,
        on_saved=lambda path: log.say(f"saved {path.name}"),
    )
    checkpoints.clean()
    newest = checkpoints.newest()
    document: dict[str, Any] = read_state(newest) if newest is not None else {"step": 0, "state": {}}
    state = document["state"]
    config, tree = together(lambda: continued(config, resolved, state=state, reader=reader))
    return Session(config, tree, folder, log, reader, checkpoints, newest, state, document["step"])


def continued(
    config: RunConfig, resolved: Mapping[str, Any], *, state: Mapping[str, Any], reader: Reader
) -> tuple[RunConfig, dict[str, Any]]:
    """The config as it holds from now on, and the same as config.yaml says it.

    The schedule's length is `train.steps` of the first start unless the config names one; a resume keeps it.
    CheckpointError lists what else differs from the `state` of an earlier start (empty: there was none).
    """
    accumulation_steps(config.train, distributed.world_size())
    first = state["config"]["train"]["schedule_steps"] if state else config.train.steps
    length = config.train.schedule_steps or first
    config = config.model_copy(update={"train": config.train.model_copy(update={"schedule_steps": length})})
    tree = plain({**resolved, **config.model_dump(mode="json")})
    if state:
        fingerprint = reader.manifest.fingerprint.model_dump(mode="json")
        refuse_differences(in_todays_terms(state["config"]), tree, out=config.out, what="config")
        refuse_differences(state["fingerprint"]["fields"], fingerprint["fields"], out=config.out, what="cache")
        if state["fingerprint"] != fingerprint:
            raise CheckpointError(f"{config.out} was trained on another cache than {config.data.caches}")
    return config, tree
