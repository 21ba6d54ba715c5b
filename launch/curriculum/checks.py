"""The rules between the stages of a curriculum, checked before any stage starts.

No stage trains on a video or image that another one scores. Weights go from one training to the next only with equal
settings. Every input exists or is made by an earlier stage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmask.launch.check import preflight
from flowmask.launch.config import load_job
from flowmask.launch.curriculum.stages import Curriculum, Stage
from flowmask.launch.finding import Finding
from flowmask.launch.jobs import CacheJob, EvaluateJob, TrainJob
from flowmask.launch.slurm import resources
from flowmask.models.errors import ConfigError, UserError
from flowmask.trainer.objectives import objective_named

_SHOWN = 4
# Keys that take over weights or a threshold -> their required maker; None: the part that the stage trains.
_WEIGHTS = {
    "model.init": None,
    "checkpoint": "dit",
    "model.mask_decoder": "mask_decoder",
    "mask_decoder": "mask_decoder",
    "presence": EvaluateJob.KIND,
}


def check(curriculum: Curriculum, *, done: set[str]) -> list[Finding]:
    """Returns all findings; raises ConfigError with the first fault. done: stages that will not run again."""
    for stage in curriculum.stages:
        _refuse_other_settings(curriculum, stage)
    if curriculum.leaks == "refuse":
        _refuse_leaks(curriculum)
    found: list[Finding] = []
    for stage in curriculum.stages:
        if stage.name not in done:
            findings = _examine(curriculum, stage)
            with _named(stage):
                preflight.refuse(findings)
            found += findings
    return found


def _examine(curriculum: Curriculum, stage: Stage) -> list[Finding]:
    """The checks of one stage; earlier stages may make missing inputs."""
    earlier = [curriculum.by_name[name].job for name in curriculum.before(stage)]
    script, asked = None, tuple[Finding, ...]()
    if stage.job.launch.cluster == "slurm":
        from flowmask.launch.slurm import executor as slurm

        settled = resources.settle(stage.job)
        script, asked = slurm.script(stage.out, slurm.whole(settled.launch), name=stage.name), settled.findings
    return preflight.examine(
        stage.job, script, asked, expected=lambda path: any(job.will_make(path) for job in earlier)
    )


def _refuse_other_settings(curriculum: Curriculum, stage: Stage) -> None:
    """Refuse weights for a stage whose settings differ from those of their training."""
    for key, name in stage.carries.items():
        source = curriculum.by_name[name]
        made, cache = source.job.makes, key.startswith("data.") and key.endswith("cache")
        if cache and made != CacheJob.KIND:
            raise ConfigError(f"stage {stage.name} carries {key} from {name}, which makes a {made}, not a cache")
        wanted = _WEIGHTS.get(key, made) or stage.job.trains
        if made != wanted:
            raise ConfigError(f"stage {stage.name} carries {key} from {name}, which makes {made}; it needs {wanted}")
        if key == "model.init":
            _refuse_unequal(curriculum, source, stage)


def _refuse_unequal(curriculum: Curriculum, source: Stage, stage: Stage) -> None:
    there, here = _conventions(curriculum, source), _conventions(curriculum, stage)
    differ = [
        f"{key} is {there[key]} in {source.name} and {here[key]} in {stage.name}"
        for key in sorted(there.keys() & here.keys())
        if there[key] != here[key]
    ]
    if differ:
        raise ConfigError(
            f"stage {stage.name} starts from the weights of {source.name}: {'; '.join(differ)}. Make them equal"
        )


def _conventions(curriculum: Curriculum, stage: Stage) -> dict[str, Any]:
    """The settings that weights depend on."""
    assert isinstance(stage.job, TrainJob)
    settings = objective_named(stage.job.objective, model=stage.job.model).settings()
    found = {key: value for key, value in settings.items() if key != "objective"}
    for folder in stage.job.caches():
        maker = curriculum.making(folder)
        if maker is not None and isinstance(maker.job, CacheJob):
            cache: Any = maker.job.cache
        elif (folder / "manifest.json").is_file():
            from flowmask.data_pipeline.cache.manifest import read_manifest

            cache = read_manifest(folder)
        else:
            continue
        found |= {"pixel_norm": cache.pixel_norm, "lowercase": cache.lowercase}
    return found


def _refuse_leaks(curriculum: Curriculum) -> None:
    """Refuse a curriculum in which a stage scores videos that another stage trains on."""
    scored = [(stage, data) for stage in curriculum.stages if (data := stage.job.scores) is not None]
    trained = {folder.resolve(): stage.name for stage in curriculum.stages for folder in stage.job.caches()}
    known = {folder: _trained_ids(curriculum, folder) for folder in trained if scored}
    for stage, data in scored:
        with _named(stage):
            ids = stage.job.video_ids()
        for folder, trainer in trained.items():
            both = sorted(video for _, video in ids & known[folder])
            if both:
                more = ", ..." if len(both) > _SHOWN else ""
                raise ConfigError(
                    f"stage {stage.name} scores {len(both)} videos that stage {trainer} is trained on "
                    f"({', '.join(both[:_SHOWN])}{more}): leave {data.split} of {data.root} out of {folder} "
                    "with cache.held_out and cache.leaks=drop, or, if it is intended, set leaks=allow in the curriculum"
                )


def _trained_ids(curriculum: Curriculum, folder: Path) -> set[tuple[str, str]]:
    """(family of datasets, video id) of the videos in a cache, present or planned."""
    maker = curriculum.making(folder)
    if maker is not None and isinstance(maker.job, CacheJob):
        with _named(maker):
            return maker.job.video_ids()
    config = folder / "config.yaml"
    if not config.is_file():
        return set()
    outside = load_job(config, CacheJob)
    try:
        return outside.video_ids()
    except UserError:
        return set()  # its dataset is missing: only the cache's own checks apply


@contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Inside the block, errors name the stage."""
    try:
        yield
    except UserError as error:
        raise ConfigError(f"stage {stage.name}: {error}") from error
