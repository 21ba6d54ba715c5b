"""Whether a stage is done, judged by the contents of its folder: fingerprints, steps, weights.

Nothing is deleted. A folder with other results than the stage would make is a ConfigError with the fix.
Hashes of weights take long, so they are cached by the identity of their checkpoint.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmask.launch.curriculum.stages import Curriculum, Stage
from flowmask.launch.jobs import CacheJob, EvaluateJob, TrainJob
from flowmask.models.errors import ConfigError, UserError
from flowmask.models.files import read_object, write_atomically
from flowmask.models.stored.typed import read_yaml
from flowmask.trainer.state.steps import STATE, newest

_MEMO_ENTRIES = 64


@dataclass(frozen=True)
class Judgement:
    """Whether a stage is done, and a short reason."""

    done: bool
    why: str


def judge(stage: Stage, *, unfinished: set[str], memo: Path) -> Judgement:
    """Judge one stage. unfinished: its unfinished needs, direct and indirect; memo: a folder for hashes.

    Raises ConfigError if its folder holds another run or cache, or results that depend on unfinished stages.
    """
    try:
        if isinstance(stage.job, CacheJob):
            return _cache(stage.job, memo)
        if isinstance(stage.job, TrainJob):
            return _train(stage, stage.job, unfinished, memo)
        assert isinstance(stage.job, EvaluateJob)
        return _evaluation(stage.job, unfinished, memo)
    except UserError as error:
        raise ConfigError(f"stage {stage.name}: {error}") from error


def judge_all(curriculum: Curriculum, *, memo: Path) -> dict[str, Judgement]:
    """Judge every stage now, in order."""
    found: dict[str, Judgement] = {}
    for stage in curriculum.stages:
        unfinished = {name for name in curriculum.before(stage) if not found[name].done}
        found[stage.name] = judge(stage, unfinished=unfinished, memo=memo)
    return found


def _cache(job: CacheJob, memo: Path) -> Judgement:
    from flowmask.data_pipeline.cache.manifest import FILE, read_manifest
    from flowmask.data_pipeline.plan.fingerprint import fingerprint, refuse_other
    from flowmask.data_pipeline.plan.leaks import without_leaks
    from flowmask.data_pipeline.plan.units import FOLDER, read_plan
    from flowmask.data_pipeline.sources import open_source

    finished = (job.out / FILE).exists()
    plan = None if finished else read_plan(job.out / FOLDER)
    if not finished and plan is None:
        return Judgement(False, "no cache yet")
    source = without_leaks(open_source(job.data), job)
    ours = fingerprint(job, source, memo=memo / "encoders.json")
    if plan is not None:
        refuse_other(ours, plan.fingerprint, where=job.out)
        return Judgement(False, "begun")
    refuse_other(ours, read_manifest(job.out).fingerprint, where=job.out)
    return Judgement(True, f"fingerprint {ours.total[:12]}")


def _train(stage: Stage, job: TrainJob, unfinished: set[str], memo: Path) -> Judgement:
    checkpoint = newest(job.out)
    if checkpoint is None:
        return Judgement(False, "no checkpoint yet")
    from flowmask.trainer.state.checkpoint import read_run
    from flowmask.trainer.state.length import if_known
    from flowmask.trainer.state.resume import fingerprint_of, refuse_other_cache, refuse_other_config

    document = read_run(checkpoint)
    state, step = document["state"], document["step"]
    job = if_known(job)
    refuse_other_config(job, state)
    _refuse_other_start(stage, job, state, unfinished, memo)
    waits = unfinished & {name for key, name in stage.carries.items() if key.startswith("data.")}
    if waits:
        return Judgement(False, f"{_names(waits)} not done")
    if (now := fingerprint_of(job.data)) is not None:
        refuse_other_cache(job, state, now)
    steps = _steps(job, state)
    if steps is None or step < steps:
        return Judgement(False, f"at step {step} of {steps or f'{job.train.epochs} epochs'}")
    if not document["updates"]:
        return Judgement(False, f"every step of {step} was skipped")
    return Judgement(True, f"step {step} of {steps}")


def _steps(job: TrainJob, state: Mapping[str, Any]) -> int | None:
    """Number of steps of a stage; for a stream at a URL, its run's steps if the run has the same epochs."""
    if job.train.epochs is None:
        return job.train.steps
    saved: int = state["config"]["train"]["steps"]
    return saved if (state.get("epochs") or 0) >= job.train.epochs else None


def _refuse_other_start(
    stage: Stage, job: TrainJob, state: Mapping[str, Any], unfinished: set[str], memo: Path
) -> None:
    """A started run continues from its own weights, so its initial weights must still be the configured ones."""
    if job.model.init is None:
        return
    source = stage.carries.get("model.init")
    fix = "give this stage another out, or restore the old weights"
    if source in unfinished:
        raise ConfigError(f"{job.out} was started from weights of stage {source}, which is not done; {fix}")
    began = (state.get("init") or {}).get("sha256")
    now = weights_sha256(job.model.init, job.makes, ema=job.model.init_ema, memo=memo)
    if began != now:
        there = began[:12] if began else "none"
        raise ConfigError(f"{job.out} was started from weights {there}, but {job.model.init} now has {now[:12]}; {fix}")


def _evaluation(job: EvaluateJob, unfinished: set[str], memo: Path) -> Judgement:
    from flowmask.trainer.predict.inference import folder_state
    from flowmask.trainer.score.archive import FILE as ARCHIVE
    from flowmask.trainer.score.evaluate import fingerprint_now
    from flowmask.trainer.score.store import SCORES

    scores = read_object(job.out / SCORES)
    if not scores:
        return Judgement(False, "no scores yet")
    if unfinished:
        return Judgement(False, f"{_names(unfinished)} not done")
    if job.archive is not None and not (job.out / ARCHIVE).is_file():
        return Judgement(False, f"no {ARCHIVE} yet")
    wan, decoder = _parts(job)
    weights = {
        "dit": weights_sha256(job.checkpoint, "dit", ema=job.ema, memo=memo),
        "mask_decoder": "vae" if decoder == "vae" else weights_sha256(decoder, "mask_decoder", ema=job.ema, memo=memo),
    }
    now = fingerprint_now(job.for_room(), weights=weights, wan_files=folder_state(wan))
    if scores.get("fingerprint") == now:
        if _archive_of(job.out) != job.archive and job.archive is not None:
            return Judgement(False, "the archive has another layout")
        return Judgement(True, f"scores of weights {weights['dit'][:12]}")
    changed = [part for part, value in weights.items() if scores.get("weights", {}).get(part) != value]
    return Judgement(
        False, f"the scores there were made with other {_names(changed) if changed else 'settings or data'}"
    )


def _parts(job: EvaluateJob) -> tuple[Path, str]:
    """The Wan folder and the mask decoder that an evaluation will use."""
    from flowmask.trainer.predict.inference import wan_path
    from flowmask.trainer.predict.weights import source_settings

    settings = source_settings(job.checkpoint)
    return wan_path(job.model.wan, settings, job.checkpoint), (
        job.mask_decoder or settings.get("mask_decoder") or "vae"
    )


def weights_sha256(source: str, part: str, *, ema: bool, memo: Path) -> str:
    """The hash of trained weights as training and evaluation record it; from `memo` if they were hashed before."""
    from flowmask.trainer.predict.parts import PARTS
    from flowmask.trainer.predict.weights import load

    path = memo / "weights.json"
    known = read_object(path)
    key = hashlib.sha256(f"{_identity(Path(source))} {part} {ema}".encode()).hexdigest()
    if key not in known:
        known = dict([*known.items(), (key, load(source, PARTS[part], ema=ema).sha256)][-_MEMO_ENTRIES:])
        memo.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(known, indent=1))
    return str(known[key])


def _identity(source: Path) -> str:
    """Identifies weights without reading them: by the checkpoint's list of hashes, else by sizes and times."""
    if (checkpoint := newest(source)) is not None:
        return hashlib.sha256((checkpoint / STATE).read_bytes()).hexdigest()
    files = sorted(source.rglob("*")) if source.is_dir() else [source] if source.exists() else []
    return f"{source.resolve()} {[(str(file), (s := file.stat()).st_size, s.st_mtime_ns) for file in files]}"


def _archive_of(out: Path) -> str | None:
    try:
        saved = read_yaml(out / "config.yaml")
    except (OSError, ValueError):
        return None
    return saved.get("archive") if isinstance(saved, dict) else None


def _names(names: Any) -> str:
    return " and ".join(sorted(names))
