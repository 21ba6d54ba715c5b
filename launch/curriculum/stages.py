"""Reads a curriculum's YAML as stages in the order of their needs, each with its complete config.

A stage is a job of `flowmask submit` with a name. Values from another stage are under `carries`, as
`KEY: ${stages.NAME.KEY}`, and nowhere else. Refuses cycles, unknown needs and kinds, and two stages with one `out`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from pydantic import Field

from flowmask.launch.config import (
    as_written,
    load_yaml,
    read_tree,
    readable,
    resolved,
    set_key,
    split_override,
    validate,
)
from flowmask.launch.configs import find_config
from flowmask.launch.curriculum.laid_over import laid_over
from flowmask.launch.jobs import TrainJob, kind_of, refuse_other_kind
from flowmask.launch.jobs.job import Job
from flowmask.launch.overlay import split
from flowmask.models.config import Section
from flowmask.models.errors import ConfigError

MARK = "curriculum.json"  # in the folder of a curriculum: its stages
DECODER = "decoder"  # a training whose objective is the mask decoder
_SOURCE = re.compile(r"\$\{stages\.([\w-]+)\.(\w*)")  # OmegaConf fills it in, but does not report the stage
_OF_A_STAGE = {"retries", "kind", "needs", "config"}


class StageConfig(Section):
    """One stage: a job's config, then `overrides`, then `carries`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="what others need it by")
    kind: str = Field(description="cache, train, decoder or evaluate")
    config: str | dict[str, Any] = Field(description="YAML of a job, relative to the curriculum's folder, or its keys")
    needs: tuple[str, ...] = Field((), description="stages that must be done before this one")
    overrides: dict[str, Any] = Field({}, description="KEY: VALUE to override the config; keys are dotted")
    carries: dict[str, str] = Field({}, description="KEY: ${stages.NAME.KEY}, from a stage in needs")
    retries: int | None = Field(
        None, ge=0, description="restarts after a crash; None: 1 on this machine, launch.max_crashes on SLURM"
    )


class CurriculumConfig(Section):
    """`flowmask curriculum`."""

    out: Path = Field(description="folder for the records of the stages' jobs")
    launch: dict[str, Any] = Field({}, description="overrides the `launch` section of every stage's config")
    values: dict[str, Any] = Field({}, description="values for ${values.NAME} anywhere below")
    leaks: Literal["refuse", "allow"] = Field(
        "refuse", description="videos that one stage trains on and another one scores"
    )
    stages: tuple[StageConfig, ...] = Field(min_length=1, description="the stages, in any order")


@dataclass(frozen=True)
class Stage:
    """One job of a curriculum; `carries`: the source stage of each carried key."""

    name: str
    job: Job
    needs: tuple[str, ...]
    carries: Mapping[str, str]
    retries: int | None

    @property
    def out(self) -> Path:
        return self.job.out


@dataclass(frozen=True)
class Curriculum:
    """All stages, each after its needs. title, group: name and folder of the parent MLflow run of the trainings."""

    path: Path
    out: Path
    leaks: Literal["refuse", "allow"]
    stages: tuple[Stage, ...]
    title: str
    group: Path

    @cached_property
    def by_name(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in self.stages}

    def before(self, stage: Stage) -> set[str]:
        """Names of all stages that must be done before this one."""
        return _before(stage.needs, self.by_name)

    def making(self, folder: object) -> Stage | None:
        """The stage whose `out` is this path; None if there is none."""
        wanted = Path(str(folder)).resolve()
        return next((stage for stage in self.stages if stage.out.resolve() == wanted), None)

    @property
    def cluster(self) -> str:
        return self.stages[0].job.launch.cluster


def load_curriculum(path: Path, overrides: Sequence[str] = ()) -> Curriculum:
    """Read a curriculum and the config of every stage; raises ConfigError with one line for any fault.

    overrides: overlays; `KEY=VALUE` of the curriculum, or `stages.NAME.KEY=VALUE` of one stage's config.
    """
    path = find_config(path)
    with readable(path):
        tree = load_yaml(path)
        refuse_other_kind(as_written(tree), "curriculum", path=path)
        overlays, given = split(overrides)
        for overlay in overlays:
            tree = OmegaConf.create(laid_over(as_written(tree), overlay, path))
        for item in given:
            _override(tree, item)
    return curriculum_of(tree, path)


def curriculum_of(tree: DictConfig, path: Path, *, title: str | None = None, group: Path | None = None) -> Curriculum:
    """The curriculum from keys read from `path` or made from it. Raises ConfigError like `load_curriculum`.

    title, group: name and folder of its MLflow run; None: the name of its `out`, and a folder in that.
    """
    config = _validated(tree, path)
    group = group or config.out / "mlflow"
    stages: dict[str, Stage] = {}
    for entry in _in_order(config.stages, path):
        stages[entry.name] = _stage(entry, config, path=path, earlier=stages, group=group)
    title = title or config.out.resolve().name
    curriculum = Curriculum(path, config.out, config.leaks, tuple(stages.values()), title, group)
    _refuse_shared_folders(curriculum)
    clusters = {stage.job.launch.cluster for stage in curriculum.stages}
    if "slurm" in clusters and len(clusters) > 1:
        raise ConfigError(f"{path}: some stages run on SLURM and some here; set launch.cluster for all of them")
    return curriculum


def _validated(config: DictConfig, path: Path) -> CurriculumConfig:
    """The curriculum with ${values...} filled in and `carries` unresolved: no stage has its config yet."""
    with readable(path):
        carries = {place: entry.pop("carries") for place, entry in enumerate(_entries(config)) if "carries" in entry}
        try:
            tree = resolved(config)
        except InterpolationResolutionError as error:
            said = f"{path}: {error.full_key} can't be filled in ({' '.join(str(error.msg).split())})"
            raise ConfigError(f"{said}; put values from another stage under `carries`") from error
    for place, found in carries.items():
        tree["stages"][place]["carries"] = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    return validate(tree, CurriculumConfig, origin=str(path))


def _entries(config: DictConfig) -> Iterator[DictConfig]:
    """The stages that are mappings; whether `stages` is a list of mappings is checked later."""
    stages = config.get("stages")
    yield from (entry for entry in stages or () if isinstance(entry, DictConfig))


def _override(config: DictConfig, item: str) -> None:
    key, value = split_override(item)
    first, _, rest = key.partition(".")
    if first != "stages":
        set_key(config, key, value, where=f"override {item!r}")
        return
    name, _, inner = rest.partition(".")
    known = {str(entry.get("name")): entry for entry in _entries(config)}
    if name not in known or not inner:
        raise ConfigError(f"override {item!r} names no key of a stage; stages are: {', '.join(known)}")
    entry = known[name]
    if inner not in _OF_A_STAGE and "overrides" not in entry:
        entry["overrides"] = {}
    (entry if inner in _OF_A_STAGE else entry["overrides"])[inner] = value


def _in_order(entries: Sequence[StageConfig], path: Path) -> list[StageConfig]:
    """Each stage after its needs, otherwise in the order of the file."""
    names = [entry.name for entry in entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{path}: two stages are called {twice}; rename one")
    for entry in entries:
        if unknown := [name for name in entry.needs if name not in names]:
            raise ConfigError(f"{path}: stage {entry.name} needs {unknown[0]}; stages are: {', '.join(names)}")
    try:
        TopologicalSorter({entry.name: entry.needs for entry in entries}).prepare()
    except CycleError as error:
        circle = " needs ".join(reversed(error.args[1]))
        raise ConfigError(f"{path}: the needs of stages form a circle: {circle}; remove one") from error
    done: list[StageConfig] = []
    left = list(entries)
    while left:
        ready = next(entry for entry in left if set(entry.needs) <= {earlier.name for earlier in done})
        done.append(ready)
        left.remove(ready)
    return done


def _stage(
    entry: StageConfig, config: CurriculumConfig, *, path: Path, earlier: Mapping[str, Stage], group: Path
) -> Stage:
    where = f"stage {entry.name}"
    inline = isinstance(entry.config, dict)
    tree = DictConfig(entry.config if inline else read_tree(path.parent / str(entry.config)))
    tree.pop("kind", None)
    carried = {key: _carried(entry, key, rule, earlier) for key, rule in entry.carries.items()}
    retries = {} if entry.retries is None else {"launch.max_crashes": entry.retries}
    launch = {f"launch.{key}": value for key, value in config.launch.items()}
    for key, value in [*launch.items(), *entry.overrides.items(), *carried.items(), *retries.items()]:
        set_key(tree, key, value, where=where)
    kind, _ = kind_of({"kind": entry.kind}, origin=f"{path}: {where}")
    if kind is TrainJob:
        for key, value in {"tracking.stage": entry.name, "tracking.parent": str(group.resolve())}.items():
            if OmegaConf.select(tree, key) is None:
                set_key(tree, key, value, where=where)
    plain: Any = OmegaConf.to_container(tree)
    job = validate(plain, kind, origin=f"{path}: {where}")
    if entry.kind == DECODER and job.makes != "mask_decoder":
        raise ConfigError(
            f"{path}: {where} is of kind decoder, but trains the {job.makes}: set objective.kind=mask_decoder"
        )
    sources = {key: _SOURCE.findall(rule)[0][0] for key, rule in entry.carries.items()}
    return Stage(entry.name, job, entry.needs, sources, entry.retries)


def _carried(entry: StageConfig, key: str, rule: str, earlier: Mapping[str, Stage]) -> Any:
    """The value of a rule, filled in from the configs of earlier stages; other stages are unknown."""
    read: dict[str, set[str]] = {}
    for name, section in _SOURCE.findall(rule):
        read.setdefault(name, set()).add(section)
    if not read:
        raise ConfigError(
            f"stage {entry.name} carries {key}: {rule}; it must have the form ${{stages.NAME.out}}; "
            "values that are not from another stage belong under `overrides`"
        )
    needed = _before(entry.needs, earlier)
    if other := next((name for name in read if name not in needed), None):
        raise ConfigError(
            f"stage {entry.name} carries {key} from {other}, which it does not need; add {other} to needs"
        )
    known = {name: earlier[name].job.model_dump(mode="json", include=keys) for name, keys in read.items()}
    try:
        return OmegaConf.to_container(OmegaConf.create({"stages": known, "value": rule}), resolve=True)["value"]  # type: ignore[call-overload,index]
    except InterpolationResolutionError as error:
        raise ConfigError(
            f"stage {entry.name} carries {key}: {rule}, but stage {next(iter(read))} has no such key"
        ) from error


def _before(needs: Sequence[str], known: Mapping[str, Stage]) -> set[str]:
    """The direct and indirect needs."""
    return set(needs).union(*(_before(known[name].needs, known) for name in needs))


def _refuse_shared_folders(curriculum: Curriculum) -> None:
    owners: dict[Path, str] = {curriculum.out.resolve(): "the curriculum itself"}
    for stage in curriculum.stages:
        other = owners.setdefault(stage.out.resolve(), stage.name)
        if other != stage.name:
            raise ConfigError(
                f"{curriculum.path}: out is {stage.out} for {other} and for {stage.name}; give each stage another out"
            )
