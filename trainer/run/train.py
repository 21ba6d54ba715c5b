"""One training run from its config to its last checkpoint; called in every process that the launcher started.

Builds the parts of a run, passes them to the loop, and closes them in reverse order.
"""

import atexit
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowmask.data_pipeline.read.batches import Batches, Plan, Reader, open_batches
from flowmask.data_pipeline.read.loader import Batch, copied
from flowmask.data_pipeline.read.mixture import MixturePlan
from flowmask.models.device import use_tf32
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.models.vae import LatentStats
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.distributed import limit_waits, lost_ranks_named
from flowmask.trainer.explain.hang import HANG, told_by_own_stack
from flowmask.trainer.explain.witness import Witness
from flowmask.trainer.objectives import objective_named
from flowmask.trainer.objectives.base import Objective
from flowmask.trainer.run.best import best_so_far, short_hash
from flowmask.trainer.run.diagnose import told, useless
from flowmask.trainer.run.guard import SpikeGuard
from flowmask.trainer.run.loop import Ending, stop_signals, train
from flowmask.trainer.run.run_state import Run
from flowmask.trainer.run.schedule import behind_the_end
from flowmask.trainer.run.session import Session, open_session, together
from flowmask.trainer.run.start import frozen_record, save_memory_and_time, share_cores, starting_module
from flowmask.trainer.run.validate import Validator, describe, make_validator
from flowmask.trainer.state.length import order
from flowmask.trainer.state.run_folder import OVERLAYS
from flowmask.trainer.step.ema import ShardedEma
from flowmask.trainer.step.engine import Engine
from flowmask.trainer.step.sequence_parallel import refuse_uneven, split_tokens
from flowmask.trainer.track.facts import facts_of
from flowmask.trainer.track.log import StepReport, throughput_of
from flowmask.trainer.track.spool import Status
from flowmask.trainer.track.tracking import Tracker, start_tracking
from flowmask.trainer.train_config import workers

_STATUS: dict[Ending | None, Status] = {Ending.FINISHED: "FINISHED", Ending.STOPPED: "KILLED"}


def run(config: RunConfig) -> int:
    """Start or resume the run in `config.out` and train it to its last step; returns the exit code.

    Collective: the launcher's variables give the rank, see `distributed.init`. Returns 0 when finished,
    REQUEUE_EXIT_CODE if a signal stopped it. Raises UserError on every rank for any user error, TrainingError if the
    guard stopped it (the state is saved) or no step counted, RankLostError if another rank hangs or is gone.
    """
    timeout_s = config.train.collective_timeout_s
    with lost_ranks_named(timeout_s, why=lambda: told_by_own_stack(config.out)), ExitStack() as stack:
        distributed.record_flights(config.out / HANG)
        distributed.init(timeout_s=timeout_s)
        use_tf32(config.train.tf32)
        atexit.register(distributed.shutdown)  # not earlier: DeepSpeed keeps the first group that it sees
        share_cores()
        session = open_session(config, stack)
        steps = session.config.train.last_step
        if session.step >= steps:
            if not session.updates:
                raise useless(session.config, session.state.get("skips", {}), updates=0)
            session.log.say(f"{config.out} is finished: step {session.step} of {steps}; nothing to do")
            return 0
        ending = _train(session, stack)
    return REQUEUE_EXIT_CODE if ending is Ending.STOPPED else 0


def _train(session: Session, stack: ExitStack) -> Ending:
    """Build all parts, train, and close them in reverse order; returns the ending. The state is saved."""
    config = session.config
    objective, plan = together(lambda: _objective_and_plan(config, reader=session.reader))
    module = together(lambda: _module(session, objective))
    validator = together(lambda: _validator(session, objective)) if config.evaluate.wanted else None
    if session.folder is not None:
        session.folder.write_config(session.config.model_dump(mode="json"))
        evaluated_step = session.state.get("evaluated_step", 0)
        session.folder.open_metrics(after_step=session.step, evaluated_step=evaluated_step)
    split_tokens(module, ranks=config.train.sequence_parallel)
    witness = Witness(config, step=session.step, say=session.log.say)
    engine = Engine(module, train=config.train, phases=witness.phases)
    stack.callback(engine.close)
    limit_waits(config.train.collective_timeout_s)
    ema = ShardedEma(engine, decay=config.ema.decay)
    if session.newest is not None:
        session.checkpoints.restore(engine, ema, session.newest)
    _say_hello(session, engine=engine, plan=plan)
    session.tracker = _tracker(session, validator) if session.folder is not None else None
    ending: Ending | None = None
    try:
        with witness, _loader(session, plan, objective) as batches, _report(session, plan, objective, module) as report:
            parts = {"plan": plan, "objective": objective, "batches": batches, "report": report, "witness": witness}
            the_run = _run_of(session, engine=engine, ema=ema, validator=validator, **parts)
            with stop_signals(the_run.request_stop):
                ending = train(the_run)
    finally:
        if session.tracker is not None:
            session.tracker.close(_STATUS.get(ending, "FAILED"))
    session.log.say(f"{ending.value} at step {the_run.step}; {told(the_run.skips)}")
    if ending in (Ending.BROKEN, Ending.EMPTY):
        raise useless(config, the_run.skips, updates=engine.updates, reason=the_run.last_skip)
    return ending


def _run_of(session: Session, *, ema: ShardedEma, validator: Validator | None, **parts: Any) -> Run:
    """The run state: restored from a checkpoint, or new."""
    state, definition = session.state, {} if validator is None else validator.definition
    best = state.get("best")
    if validator is not None:
        best = best_so_far(state, session.config, definition, say=session.log.say)

    def measure(run: Run) -> dict[str, float] | None:
        assert validator is not None
        return validator.measure(ema, step=run.step, stop=run.stop_asked, pictures=_pictures(run))

    return Run(
        config=session.config,
        ema=ema,
        guard=SpikeGuard(session.config.guard, state=state.get("guard")),
        log=session.log,
        checkpoints=session.checkpoints,
        begin_save=lambda run: _begin_save(session, run),
        measure=measure,
        on_validated=lambda run, found: _report_validation(session, run, found),
        step=session.step,
        skips=+Counter(state.get("skips") or {"for a reason not recorded": state.get("skipped", 0)}),
        skipped_in_a_row=state.get("skipped_in_a_row", 0),
        evaluated_step=state.get("evaluated_step", 0),
        best=best,
        definition=definition,
        **parts,
    )


def _validator(session: Session, objective: Objective) -> Validator:
    config = session.config
    return make_validator(
        config,
        session.reader,
        objective=objective.quiet(),
        conventions=_settings(session, objective),
        build=lambda: _starting(session, objective, resumed=True)[0],
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        say=session.log.say,
    )


def _pictures(run: Run) -> Path:
    """The folder of the overlay videos of this step's evaluation."""
    return run.config.out / OVERLAYS / f"step_{run.step:08d}"


def _report_validation(session: Session, run: Run, found: Mapping[str, float]) -> None:
    session.log.say(f"evaluated step {run.step}: {describe(found)}{' (best)' if run.is_best else ''}")
    if session.folder is not None:
        row = {"step": run.step, **found, "best": run.is_best, "definition": short_hash(run.definition)}
        session.folder.add_evaluation(row)
    if session.tracker is not None:
        session.tracker.log(run.step, found)
        if _pictures(run).is_dir():
            session.tracker.artifact(_pictures(run), to=f"evaluation/{_pictures(run).name}")


def _objective_and_plan(config: RunConfig, *, reader: Reader) -> tuple[Objective, Plan]:
    stats = LatentStats.from_lists(reader.manifest.latents_mean, reader.manifest.latents_std)
    objective = objective_named(config.objective, model=config.model, stats=stats)
    objective.check_cache(reader.manifest, where=config.data.caches)
    if "text" in objective.needs:
        reader.check_text_tokens(config.model.text_tokens)
    return objective, order(config, reader)


def _module(session: Session, objective: Objective) -> nn.Module:
    """The module with its initial weights; a resume later replaces them by the checkpoint's."""
    config = session.config
    resumed = session.newest is not None
    module, taken = _starting(session, objective, resumed=resumed)
    session.state["init"] = session.state.get("init") if resumed else taken
    shape: Any = getattr(module, "config", {})
    refuse_uneven(shape, ranks=config.train.sequence_parallel, buckets=session.reader.manifest.buckets)
    save_memory_and_time(config, objective, module)
    session.state["frozen"] = frozen_record(config, module, known=session.state.get("frozen"), resumed=resumed)
    return module


def _starting(session: Session, objective: Objective, *, resumed: bool) -> tuple[nn.Module, Any]:
    settings = _settings(session, objective)
    return starting_module(session.config, objective, settings=settings, resumed=resumed)


def _settings(session: Session, objective: Objective) -> dict[str, Any]:
    """The conventions of the weights: the objective's, and those of its cache."""
    manifest = session.reader.manifest
    if "video_mean" not in objective.needs:
        return objective.settings()
    return objective.settings() | {"pixel_norm": manifest.pixel_norm, "lowercase": manifest.lowercase}


def _loader(session: Session, plan: Plan, objective: Objective) -> Batches:
    config, device = session.config, distributed.device()

    def prepare(batch: Batch) -> Batch:
        return copied(objective.prepare(batch), device)

    return open_batches(
        session.reader,
        plan,
        rank=distributed.rank() // config.train.sequence_parallel,
        world_size=distributed.world_size() // config.train.sequence_parallel,
        micro_batch=config.train.micro_batch,
        needs=objective.needs,
        text_tokens=config.model.text_tokens,
        prepare=prepare,
        threads=config.data.threads,
        prefetch_batches=config.data.prefetch_batches,
        start_step=session.step,
    )


def _report(session: Session, plan: Plan, objective: Objective, module: nn.Module) -> StepReport:
    config = session.config
    return StepReport(
        session.log,
        session.folder,
        throughput_of(config, plan, objective, buckets=session.reader.manifest.buckets, module=module),
        steps=config.train.last_step,
        start_step=session.step,
        every_steps=config.train.log_every_steps,
    )


def _tracker(session: Session, validator: Validator | None) -> Tracker | None:
    return start_tracking(
        session.config,
        facts_of(session.config, session.reader, None if validator is None else validator.reader),
        resumed=session.newest is not None,
        run_id=session.state.get("mlflow_run_id"),
        warn=session.log.say,
    )


def _begin_save(session: Session, run: Run) -> None:
    """Begin to save all state that a resume needs at `run.step`. Collective."""
    state = {
        "config": session.config.model_dump(mode="json"),
        "epochs": session.epochs,
        "fingerprint": session.reader.manifest.fingerprint.model_dump(mode="json"),
        "settings": _settings(session, run.objective),
        "init": session.state.get("init"),
        "frozen": session.state.get("frozen"),
        "mlflow_run_id": session.tracker.run_id if session.tracker is not None else None,
        "skips": dict(run.skips),
        "skipped_in_a_row": 0 if run.broken else run.skipped_in_a_row,
        "guard": run.guard.state(),
        "evaluated_step": run.evaluated_step,
        "best": run.best,
    }
    session.checkpoints.begin(
        run.engine,
        run.ema,
        step=run.step,
        state=state,
        best=run.is_best,
        before_publish=session.folder.sync if session.folder is not None else lambda: None,
    )


def _say_hello(session: Session, *, engine: Engine, plan: Plan) -> None:
    config, say = session.config, session.log.say
    parameters = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    say(
        f"{config.objective.kind}: {parameters / 1e6:.2f} M parameters, {config.train.precision}, "
        f"ZeRO {engine.zero_stage}, {workers(config.train, distributed.world_size())} x micro-batch "
        f"{config.train.micro_batch} x {engine.accumulation} = global batch {config.train.global_batch}"
    )
    manifest = session.reader.manifest
    say(f"{config.data.caches}: {manifest.examples} examples, fingerprint {manifest.fingerprint.total[:12]}")
    if isinstance(plan, MixturePlan):
        seen = ", ".join(f"{epochs:.2f}" for epochs in plan.progress_of_each(config.train.last_step))
        say(f"epochs of each cache at the last step: {seen}; `epoch` is the least of them")
    lost = {name: counts for name, counts in plan.dropped().items() if any(counts)}
    if lost:
        say(f"data.remainder is drop: examples dropped in each epoch of each view, by bucket: {lost}")
    if (behind := behind_the_end(config.train, step=session.step, out=config.out)) is not None:
        say(behind)
    if session.newest is not None:
        say(f"continuing from {session.newest.name} of {config.train.last_step} steps")
    elif session.state.get("init"):
        say(f"starting from the weights of {config.model.init}: {session.state['init']}")
