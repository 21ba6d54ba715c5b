"""One training run from its config to its last checkpoint; called in every process that the launcher started.

Owns the order in which things are opened, checked and closed. What a person did wrong is found before a
model is built, by all ranks together, so that no rank waits for one that has given up.
"""

import atexit
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from data_pipeline.epoch_plan import EpochPlan
from data_pipeline.loader import Batch, Loader
from data_pipeline.reader import CacheReader
from models.errors import CheckpointError, ConfigError, TrainingError, UserError
from models.vae import LatentStats
from trainer import distributed
from trainer.checkpoint import Checkpoints, read_state
from trainer.config import REQUEUE_EXIT_CODE, RunConfig, accumulation_steps
from trainer.ema import ShardedEma
from trainer.engine import Engine
from trainer.log import RunLog, StepReport
from trainer.loop import Ending, Run, stop_signals, train
from trainer.objectives import Objective, objective_named
from trainer.run_folder import CHECKPOINTS, LOG, TRACKING, RunFolder, flatten, plain, refuse_differences
from trainer.tracking import Status, Tracker, default_uri
from trainer.weights import start_from

_STATUS: dict[Ending | None, Status] = {Ending.FINISHED: "FINISHED", Ending.STOPPED: "KILLED"}

T = TypeVar("T")


@dataclass
class Session:
    """What one start of a run has open. `folder` is None above rank 0; `state` is what was saved."""

    config: RunConfig
    resolved: dict[str, Any]
    folder: RunFolder | None
    log: RunLog
    reader: CacheReader
    checkpoints: Checkpoints
    newest: Path | None
    state: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    tracker: Tracker | None = None


def run(config: RunConfig, *, resolved: Mapping[str, Any]) -> int:
    """Start or resume the run in `config.out` and train it to `train.steps`; returns the exit code.

    resolved: what is saved as config.yaml. Collective: the launcher's RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT say who calls. 0 when finished, REQUEUE_EXIT_CODE when a signal stopped it.
    Raises UserError on every rank if anything is wrong, TrainingError if the guard stopped it with the state
    saved.
    """
    distributed.init()
    atexit.register(distributed.shutdown)  # not before: DeepSpeed keeps the group that it saw first
    _share_cores()
    with ExitStack() as stack:
        session = _open(config, resolved, stack)
        steps = session.config.train.steps
        if session.step >= steps:
            session.log.say(f"{config.out} is finished: step {session.step} of {steps}; nothing to do")
            return 0
        ending = _train(session, stack)
    if ending is Ending.BROKEN:
        raise TrainingError(
            f"{config.out} stopped: {config.guard.max_consecutive_skips} steps in a row had no finite loss "
            "or gradient; the last good weights are saved. See log.txt for the examples, or lower train.lr"
        )
    return REQUEUE_EXIT_CODE if ending is Ending.STOPPED else 0


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


def _open(config: RunConfig, resolved: Mapping[str, Any], stack: ExitStack) -> Session:
    """Lock the folder, open the cache, find the checkpoint to go on from, and check that they match."""
    leader = distributed.rank() == 0
    folder = together(lambda: RunFolder(config.out) if leader else None)
    if folder is not None:
        stack.callback(folder.close)
    log = RunLog(config.out / LOG if leader else None)
    stack.callback(log.close)
    reader = together(lambda: CacheReader(config.data.cache))
    stack.callback(reader.close)
    checkpoints = Checkpoints(config.out / CHECKPOINTS, keep_last=config.checkpoint.keep_last, warn=log.say)
    checkpoints.clean()
    newest = checkpoints.newest()
    document: dict[str, Any] = read_state(newest) if newest is not None else {"step": 0, "state": {}}
    state = document["state"]
    config, tree = together(lambda: continued(config, resolved, state=state, reader=reader))
    return Session(config, tree, folder, log, reader, checkpoints, newest, state, document["step"])


def continued(
    config: RunConfig, resolved: Mapping[str, Any], *, state: Mapping[str, Any], reader: CacheReader
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
        refuse_differences(state["config"], tree, out=config.out, what="config")
        refuse_differences(
            state["fingerprint"]["fields"], fingerprint["fields"], out=config.out, what="cache"
        )
        if state["fingerprint"] != fingerprint:
            raise CheckpointError(f"{config.out} was trained on another cache than {config.data.cache}")
    return config, tree


def _train(session: Session, stack: ExitStack) -> Ending:
    """Build everything, train, close everything in reverse; the ending, with the state saved."""
    config = session.config
    objective, plan = together(lambda: _objective_and_plan(config, reader=session.reader))
    module = together(lambda: _module(session, objective))
    if session.folder is not None:
        session.folder.write_config(session.resolved)
        session.folder.open_metrics(after_step=session.step)
    engine = Engine(module, train=config.train)
    stack.callback(engine.close)
    ema = ShardedEma(engine, decay=config.ema.decay)
    if session.newest is not None:
        session.checkpoints.restore(engine, ema, session.newest)
    _say_hello(session, engine=engine, plan=plan)
    session.tracker = _tracker(session) if session.folder is not None else None
    ending: Ending | None = None
    try:
        with _loader(session, plan, objective) as batches, _report(session) as report:
            the_run = Run(
                config=config,
                plan=plan,
                engine=engine,
                ema=ema,
                objective=objective,
                batches=batches,
                report=report,
                log=session.log,
                save_state=lambda run: _save(session, run),
                step=session.step,
                saved_step=session.step,
                skipped=session.state.get("skipped", 0),
                skipped_in_a_row=session.state.get("skipped_in_a_row", 0),
            )
            with stop_signals(the_run.request_stop):
                ending = train(the_run)
    finally:
        if session.tracker is not None:
            session.tracker.close(_STATUS.get(ending, "FAILED"))
    session.log.say(f"{ending.value} at step {the_run.step}; {the_run.skipped} steps skipped in all")
    return ending


def _objective_and_plan(config: RunConfig, *, reader: CacheReader) -> tuple[Objective, EpochPlan]:
    stats = LatentStats.from_lists(reader.manifest.latents_mean, reader.manifest.latents_std)
    objective = objective_named(config.objective, model=config.model, stats=stats)
    if "text" in objective.needs:
        reader.check_text_tokens(config.model.text_tokens)
    train, remainder = config.train, config.data.remainder
    plan = EpochPlan(reader.buckets, global_batch=train.global_batch, seed=train.seed, remainder=remainder)
    return objective, plan


def _module(session: Session, objective: Objective) -> nn.Module:
    """The module with the weights it starts from; on a resume the checkpoint's replace them later."""
    config = session.config
    module = objective.build().requires_grad_(True)
    if config.train.activation_checkpointing:
        if not getattr(module, "_supports_gradient_checkpointing", False):
            raise ConfigError(
                f"train.activation_checkpointing is true, but the module of objective.kind "
                f"{config.objective.kind} can't recompute; set it to false"
            )
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    if session.newest is None and config.model.init is not None:
        session.state["init"] = start_from(
            config.model.init, module, ema=config.model.init_ema, settings=_settings(session, objective)
        )
    return module


def _settings(session: Session, objective: Objective) -> dict[str, Any]:
    """The conventions of the weights: the objective's, and those of the cache that its input comes from."""
    manifest = session.reader.manifest
    if "video_mean" not in objective.needs:
        return objective.settings()
    return objective.settings() | {"pixel_norm": manifest.pixel_norm, "lowercase": manifest.lowercase}


def _loader(session: Session, plan: EpochPlan, objective: Objective) -> Loader:
    config, device = session.config, distributed.device()

    def prepare(batch: Batch) -> Batch:
        return objective.prepare(batch).to(device)

    return Loader(
        session.reader,
        plan,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch=config.train.micro_batch,
        needs=objective.needs,
        text_tokens=config.model.text_tokens,
        prepare=prepare,
        threads=config.data.threads,
        prefetch_batches=config.data.prefetch_batches,
        start_step=session.step,
    )


def _report(session: Session) -> StepReport:
    train = session.config.train
    return StepReport(
        session.log,
        session.folder,
        session.tracker,
        steps=train.steps,
        start_step=session.step,
        global_batch=train.global_batch,
        every_steps=train.log_every_steps,
    )


def _tracker(session: Session) -> Tracker | None:
    tracking, out = session.config.tracking, session.config.out
    if not tracking.enabled:
        return None
    fingerprint = session.reader.manifest.fingerprint.total
    return Tracker(
        uri=tracking.uri or default_uri(out),
        experiment=tracking.experiment,
        name=out.resolve().name,
        params={**flatten(session.resolved), "fingerprint": fingerprint},
        identity=out / TRACKING,
        warn=session.log.say,
    )


def _save(session: Session, run: Run) -> None:
    """Save everything that a resume needs, as of `run.step`; collective."""
    if session.folder is not None:
        session.folder.sync()
    state = {
        "config": session.resolved,
        "fingerprint": session.reader.manifest.fingerprint.model_dump(mode="json"),
        "settings": _settings(session, run.objective),
        "init": session.state.get("init"),
        "mlflow_run_id": session.tracker.run_id if session.tracker is not None else None,
        "skipped": run.skipped,
        "skipped_in_a_row": 0 if run.broken else run.skipped_in_a_row,
    }
    path = session.checkpoints.save(run.engine, run.ema, step=run.step, state=state)
    session.log.say(f"saved {path.name}")


def _say_hello(session: Session, *, engine: Engine, plan: EpochPlan) -> None:
    config, say = session.config, session.log.say
    parameters = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    say(
        f"{config.objective.kind}: {parameters / 1e6:.2f} M parameters, {config.train.precision}, "
        f"ZeRO {engine.zero_stage}, {distributed.world_size()} processes x micro-batch "
        f"{config.train.micro_batch} x {engine.accumulation} = global batch {config.train.global_batch}"
    )
    manifest = session.reader.manifest
    say(f"{config.data.cache}: {manifest.examples} examples, fingerprint {manifest.fingerprint.total[:12]}")
    lost = {name: counts for name, counts in plan.dropped().items() if any(counts)}
    if lost:
        say(f"data.remainder is drop: examples left out of an epoch of each view, by bucket: {lost}")
    if session.newest is not None:
        say(f"going on from {session.newest.name} of {config.train.steps} steps")
    elif session.state.get("init"):
        say(f"starting from the weights of {config.model.init}: {session.state['init']}")


def _share_cores() -> None:
    """Split the machine's cores between its processes, unless OMP_NUM_THREADS already says how."""
    if distributed.device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
