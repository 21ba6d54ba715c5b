"""What must hold between the stages of a curriculum, asked before any of them starts.

No stage trains on a video or image that another one scores, what goes from one training to the next was made with
equal settings, and every input is there or is made by an earlier stage.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowmask.launch.check import preflight
from flowmask.launch.check.preflight import Check
from flowmask.launch.config import CacheJob, EvaluateJob, TrainJob
from flowmask.launch.curriculum.stages import Curriculum, Stage
from flowmask.launch.slurm import resources
from flowmask.models.errors import ConfigError, UserError
from flowmask.trainer.objectives import objective_named

_SHOWN = 4


def check(curriculum: Curriculum, *, done: set[str]) -> list[Check]:
    """ConfigError with the first thing that is wrong; else what was checked. done: stages that are not run again."""
    for stage in curriculum.stages:
        _settings(curriculum, stage)
    if curriculum.leaks == "refuse":
        _leaks(curriculum)
    found: list[Check] = []
    for stage in curriculum.stages:
        if stage.name in done:
            continue
        checks = list(_inputs(curriculum, stage))
        try:
            preflight.refuse(checks)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error
        found += checks
    return found


def _inputs(curriculum: Curriculum, stage: Stage) -> Iterator[Check]:
    """A stage's own checks, but for what the stages before it will make."""
    made = [str(curriculum.by_name[name].out) for name in curriculum.before(stage)]
    here = re.compile(rf"(?<!\S)(?:{'|'.join(map(re.escape, made)) or '(?!)'})(?=[/\s;,:]|$)")
    script, asked = _to_slurm(stage)
    for found in preflight.examine(stage.job, script, asked):
        if found.state != "fail" or not here.search(found.found):
            yield found


def _to_slurm(stage: Stage) -> tuple[str | None, tuple[Check, ...]]:
    """The script that sbatch would be given, and what was found about the nodes it asks for."""
    if stage.job.launch.cluster != "slurm":
        return None, ()
    from flowmask.launch.slurm import executor as slurm

    asked = resources.settle(stage.job)
    return slurm.script(stage.out, asked.launch, name=stage.name), asked.checks


def _settings(curriculum: Curriculum, stage: Stage) -> None:
    """Weights are only handed on to a stage that uses them as they were trained."""
    for key, name in stage.carries.items():
        source = curriculum.by_name[name]
        if key in ("model.init", "checkpoint", "model.mask_decoder", "mask_decoder"):
            _weights(key, source, stage)
            if key == "model.init":
                _equal(curriculum, source, stage)
        if key.startswith("data.") and key.endswith("cache") and not isinstance(source.job, CacheJob):
            raise ConfigError(f"stage {stage.name} carries {key} from {name}, which is no cache but a {source.kind}")


def _weights(key: str, source: Stage, stage: Stage) -> None:
    job = stage.job
    if key == "model.init":
        wanted = job.makes if isinstance(job, TrainJob) else ""
    else:
        wanted = "dit" if key == "checkpoint" else "mask_decoder"
    made = source.job.makes if isinstance(source.job, TrainJob) else source.kind
    if made != wanted:
        raise ConfigError(f"stage {stage.name} carries {key} from {source.name}, which makes {made}; it needs {wanted}")


def _equal(curriculum: Curriculum, source: Stage, stage: Stage) -> None:
    there, here = _conventions(curriculum, source), _conventions(curriculum, stage)
    differ = [
        f"{key} is {there[key]} in {source.name} and {here[key]} in {stage.name}"
        for key in there.keys() & here.keys()
        if there[key] != here[key]
    ]
    if differ:
        raise ConfigError(
            f"stage {stage.name} starts from the weights of {source.name}: {'; '.join(sorted(differ))}. Make them equal"
        )


def _conventions(curriculum: Curriculum, stage: Stage) -> dict[str, Any]:
    """The settings that weights depend on."""
    assert isinstance(stage.job, TrainJob)
    settings = objective_named(stage.job.objective, model=stage.job.model).settings()
    found = {key: value for key, value in settings.items() if key != "objective"}
    for folder in _caches(stage.job):
        maker = curriculum.making(folder)
        if maker is not None and isinstance(maker.job, CacheJob):
            cache = maker.job.cache
            found |= {"pixel_norm": cache.pixel_norm, "lowercase": cache.lowercase}
        elif (folder / "manifest.json").is_file():
            from flowmask.data_pipeline.cache.manifest import read_manifest

            manifest = read_manifest(folder)
            found |= {"pixel_norm": manifest.pixel_norm, "lowercase": manifest.lowercase}
    return found


def _caches(job: TrainJob) -> list[Path]:
    """Its caches that are folders."""
    named: list[Any] = [entry.cache for entry in job.data.mix] or [job.data.cache]
    return [cache for cache in named if isinstance(cache, Path)]


def _leaks(curriculum: Curriculum) -> None:
    """Ids of every evaluation's videos against those of every cache that something is trained on."""
    scored = [stage for stage in curriculum.stages if isinstance(stage.job, EvaluateJob)]
    trained = {
        folder.resolve(): stage.name
        for stage in curriculum.stages
        if isinstance(stage.job, TrainJob)
        for folder in _caches(stage.job)
    }
    if not scored:
        return
    known = {folder: _trained_ids(curriculum, folder) for folder in trained}
    for stage in scored:
        assert isinstance(stage.job, EvaluateJob)
        ids = _ids(stage, lambda job=stage.job: _scored_ids(job))
        for folder, trainer in trained.items():
            both = sorted(video for family, video in ids & known[folder])
            if both:
                more = ", ..." if len(both) > _SHOWN else ""
                data = stage.job.data
                raise ConfigError(
                    f"stage {stage.name} scores {len(both)} videos that stage {trainer} is trained on "
                    f"({', '.join(both[:_SHOWN])}{more}): leave {data.split} of {data.root} out of {folder} with "
                    "cache.held_out and cache.leaks=drop, or, if you mean it, set the curriculum's leaks=allow"
                )


def _trained_ids(curriculum: Curriculum, folder: Path) -> set[tuple[str, str]]:
    """(family of datasets, video id) of what a cache holds or will hold."""
    maker = curriculum.making(folder)
    if maker is not None and isinstance(maker.job, CacheJob):
        job = maker.job
        return _ids(maker, lambda: _planned_ids(job))
    config = folder / "config.yaml"
    if not config.is_file():
        return set()
    from flowmask.launch.config import load_job

    outside = load_job(config, CacheJob)
    try:
        return _planned_ids(outside)
    except UserError:
        return set()  # its dataset is gone: the cache's own checks have to do


def _planned_ids(job: CacheJob) -> set[tuple[str, str]]:
    from flowmask.data_pipeline.config import source_names
    from flowmask.data_pipeline.plan.leaks import family_of, without_leaks
    from flowmask.data_pipeline.sources import open_source

    families = dict(zip(source_names(job.sources), map(family_of, job.sources), strict=True))
    videos = without_leaks(open_source(job.data), job).videos()
    return {(families[video.source], video.video_id) for video in videos if video.expressions}


def _scored_ids(job: EvaluateJob) -> set[tuple[str, str]]:
    from flowmask.data_pipeline.plan.leaks import family_of
    from flowmask.data_pipeline.sources import open_source

    family = family_of(job.data)
    videos = list(open_source(job.data).videos())[: job.max_videos]
    return {(family, video.video_id) for video in videos if video.expressions}


def _ids(stage: Stage, read: Any) -> set[tuple[str, str]]:
    try:
        found: set[tuple[str, str]] = read()
    except UserError as error:
        raise ConfigError(f"stage {stage.name}: {error}") from error
    return found
