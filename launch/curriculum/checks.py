"""What must hold between the stages of a curriculum, asked before any of them starts.

No stage trains on a video or image that another one scores, what goes from one training to the next was made with
equal settings, and every input is there or is made by an earlier stage.
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
# What takes over weights or a threshold, and what must have made them; None: the stage's own.
_WEIGHTS = {
    "model.init": None,
    "checkpoint": "dit",
    "model.mask_decoder": "mask_decoder",
    "mask_decoder": "mask_decoder",
    "presence": EvaluateJob.KIND,
}


def check(curriculum: Curriculum, *, done: set[str]) -> list[Finding]:
    """ConfigError with the first thing that is wrong; else what was found. done: stages that are not run again."""
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
    """A stage's own checks; what is missing may be made by the stages before it."""
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
    """Weights are only handed on to a stage that uses them as they were trained."""
    for key, name in stage.carries.items():
        source = curriculum.by_name[name]
        made, cache = source.job.makes, key.startswith("data.") and key.endswith("cache")
        if cache and made != CacheJob.KIND:
            raise ConfigError(f"stage {stage.name} carries {key} from {name}, which is no cache but a {made}")
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
    """Ids of all videos that are scored against those of every cache that something is trained on."""
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
                    "with cache.held_out and cache.leaks=drop, or, if you mean it, set the curriculum's leaks=allow"
                )


def _trained_ids(curriculum: Curriculum, folder: Path) -> set[tuple[str, str]]:
    """(family of datasets, video id) of what a cache holds or will hold."""
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
        return set()  # its dataset is gone: the cache's own checks have to do


@contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """While inside, an error is that of a stage."""
    try:
        yield
    except UserError as error:
        raise ConfigError(f"stage {stage.name}: {error}") from error
