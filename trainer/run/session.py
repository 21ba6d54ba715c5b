"""The open files and objects of one start of a run, and the order in which they are opened and checked.

User errors are found before a model is built, by all ranks together, so that no rank waits for one that has
already ended.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flowmask.data_pipeline.plan.leaks import refuse_evaluation
from flowmask.data_pipeline.read.batches import Reader, caches_of, open_reader
from flowmask.models.errors import UserError
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.state.checkpoint import read_run
from flowmask.trainer.state.length import in_steps
from flowmask.trainer.state.owner import note_start
from flowmask.trainer.state.resume import refuse_other_cache, refuse_other_config, settled
from flowmask.trainer.state.run_folder import CHECKPOINTS, LOG, RunFolder
from flowmask.trainer.state.saving import Checkpoints
from flowmask.trainer.track.log import RunLog
from flowmask.trainer.track.tracking import Tracker
from flowmask.trainer.train_config import accumulation_steps

T = TypeVar("T")


@dataclass
class Session:
    """The open parts of one start of a run. `folder` is None above rank 0; `state` is the saved state."""

    config: RunConfig
    folder: RunFolder | None
    log: RunLog
    reader: Reader
    checkpoints: Checkpoints
    newest: Path | None
    state: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    updates: int = 0  # steps that counted
    epochs: int | None = None  # as configured; `config` has them converted to steps
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


def open_session(config: RunConfig, stack: ExitStack) -> Session:
    """Lock the folder, open the cache, find the checkpoint to resume from, and check that they match."""
    leader = distributed.rank() == 0
    folder = together(lambda: RunFolder(config.out) if leader else None)
    if folder is not None:
        stack.callback(folder.close)
        note_start(config.out)
    log = RunLog(config.out / LOG if leader else None)
    stack.callback(log.close)
    reader = together(lambda: open_reader(config.data, check=leader, pin=distributed.device().type == "cuda"))
    stack.callback(reader.close)
    together(lambda: refuse_evaluation((cache.manifest for cache in caches_of(reader)), where=config.data.caches))
    checkpoints = Checkpoints(
        config.out / CHECKPOINTS,
        config=config.checkpoint,
        warn=log.say,
        on_saved=lambda path: log.say(f"saved {path.name}"),
    )
    checkpoints.clean()
    newest = checkpoints.newest()
    asked, config = config.train.epochs, together(lambda: in_steps(config, reader))
    if asked is not None:
        log.say(f"train.epochs {asked} of {config.data.caches}: {config.train.last_step} steps")
    document: dict[str, Any] = read_run(newest) if newest is not None else {"step": 0, "updates": 0, "state": {}}
    state = document["state"]
    together(lambda: _refuse_what_cannot_go_on(config, state, reader))
    config = settled(config, state)
    found = (state, document["step"], document["updates"])
    return Session(config, folder, log, reader, checkpoints, newest, *found, epochs=asked)


def _refuse_what_cannot_go_on(config: RunConfig, state: Mapping[str, Any], reader: Reader) -> None:
    """UserError for a batch that these processes can't share, or for another run's config or cache."""
    accumulation_steps(config.train, distributed.world_size())
    if state:
        refuse_other_config(config, state)
        refuse_other_cache(config, state, reader.manifest.fingerprint)
