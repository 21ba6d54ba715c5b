"""A curriculum's YAML as stages in the order of their needs, each with its whole config, or one line about it.

A stage is a job of `flowmask submit` with a name. What it takes over from another one stands under `carries`, as
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
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from flowmask.launch.config import CacheJob, EvaluateJob, TrainJob, read_tree, validate
from flowmask.launch.configs import find_config
from flowmask.launch.jobs import KINDS
from flowmask.models.config import Section
from flowmask.models.errors import ConfigError
from flowmask.trainer.state.run_folder import flatten

AnyJob = CacheJob | TrainJob | EvaluateJob
MARK = "curriculum.json"  # in the folder of a curriculum: its stages
DECODER = "decoder"  # a training whose objective is the mask decoder
_CARRIED = re.compile(r"\$\{stages\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_.]+)\}")


class StageConfig(Section):
    """One stage: a job's config and what is laid over it, in the order overrides, carries."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    kind: str = Field(description="cache, train, decoder or evaluate")
    config: str | dict[str, Any] = Field(description="a job's YAML, from the curriculum's folder, or its keys")
    needs: tuple[str, ...] = ()
    overrides: dict[str, Any] = Field({}, description="KEY: VALUE over the config, dotted")
    carries: dict[str, str] = Field({}, description="KEY: ${stages.NAME.KEY}, from a stage that is needed")
    retries: int | None = Field(
        None, ge=0, description="starts after a crash; None: once here, launch.max_crashes on SLURM"
    )


class CurriculumConfig(Section):
    """`flowmask curriculum`."""

    out: Path = Field(description="folder for what is known of the stages' jobs")
    launch: dict[str, Any] = Field({}, description="over the `launch` section of every stage's config")
    values: dict[str, Any] = Field({}, description="for ${values.NAME} anywhere below")
    leaks: Literal["refuse", "allow"] = Field(
        "refuse", description="videos that one stage trains on and another one scores"
    )
    stages: tuple[StageConfig, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Stage:
    """One job of a curriculum; `carries` says from which stage each carried key comes."""

    name: str
    kind: str
    job: AnyJob
    needs: tuple[str, ...]
    carries: Mapping[str, str]
    retries: int | None

    @property
    def out(self) -> Path:
        return self.job.out


@dataclass(frozen=True)
class Curriculum:
    """All stages, each behind those it needs."""

    path: Path
    out: Path
    leaks: Literal["refuse", "allow"]
    stages: tuple[Stage, ...]

    @cached_property
    def by_name(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in self.stages}

    def before(self, stage: Stage) -> set[str]:
        """Every stage that has to be done before this one."""
        return set(stage.needs).union(*(self.before(self.by_name[name]) for name in stage.needs))

    def making(self, folder: object) -> Stage | None:
        """The stage whose `out` a path is."""
        wanted = Path(str(folder)).resolve()
        return next((stage for stage in self.stages if stage.out.resolve() == wanted), None)

    @property
    def cluster(self) -> str:
        return self.stages[0].job.launch.cluster


def load_curriculum(path: Path, overrides: Sequence[str] = ()) -> Curriculum:
    """Read a curriculum and the config of every stage; ConfigError in one line about whatever is wrong.

    overrides: `KEY=VALUE` of the curriculum, or `stages.NAME.KEY=VALUE` of one stage's config.
    """
    path = find_config(path)
    config = _read(path, overrides)
    jobs: dict[str, Stage] = {}
    for entry in _in_order(config.stages, path):
        jobs[entry.name] = _stage(entry, config, path=path, earlier=jobs)
    curriculum = Curriculum(path, config.out, config.leaks, tuple(jobs.values()))
    _refuse_shared_folders(curriculum)
    if len({stage.job.launch.cluster for stage in curriculum.stages} - {"debug", "local"}) and any(
        stage.job.launch.cluster != "slurm" for stage in curriculum.stages
    ):
        raise ConfigError(f"{path}: some stages run on SLURM and some here; set launch.cluster for all of them")
    return curriculum


def _read(path: Path, overrides: Sequence[str]) -> CurriculumConfig:
    """The curriculum with ${values...} filled in and ${stages...} left as they are."""
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig) or not loaded:
            raise ConfigError(f"config {path} holds no keys; it must be a YAML mapping")
        plain: Any = OmegaConf.to_container(loaded)
        for item in overrides:
            _override(plain, item)
        carried = _without_carries(plain, path)
        resolved: Any = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except Exception as error:  # PyYAML's own errors have no common base with the above
        if isinstance(error, ConfigError) or "yaml" not in type(error).__module__:
            raise
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    for place, carries in carried.items():
        resolved["stages"][place]["carries"] = carries
    return validate(resolved, CurriculumConfig, origin=str(path))


def _override(tree: dict[str, Any], item: str) -> None:
    if "=" not in item or item.startswith("="):
        raise ConfigError(f"override {item!r} is not KEY=VALUE, for example launch.cluster=slurm")
    key, _, text = item.partition("=")
    value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    assert isinstance(value, dict)
    first, _, rest = key.partition(".")
    if first != "stages":
        put(tree, key, value["value"], where="the curriculum")
        return
    name, _, inner = rest.partition(".")
    entries = [entry for entry in tree.get("stages") or [] if isinstance(entry, dict)]
    known = {str(entry.get("name")): entry for entry in entries}
    if name not in known or not inner:
        raise ConfigError(f"override {item!r} names no key of a stage; stages are: {', '.join(known)}")
    if inner in ("retries", "kind", "needs", "config"):
        known[name][inner] = value["value"]
    else:
        known[name].setdefault("overrides", {})[inner] = value["value"]


def _without_carries(tree: dict[str, Any], path: Path) -> dict[int, Any]:
    """Takes the carries out, by place of the stage: OmegaConf would look for stages by their number."""
    stages = tree.get("stages")
    taken: dict[int, Any] = {}
    for place, entry in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(entry, dict) and "carries" in entry:
            taken[place] = entry.pop("carries")
    for key, value in _strings(tree):
        if _CARRIED.search(value):
            raise ConfigError(f"{path}: {key} is {value}; what comes from another stage stands under `carries`")
    return taken


def _strings(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _strings(value, f"{prefix}{key}.")
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from _strings(value, f"{prefix}{place}.")
    elif isinstance(tree, str):
        yield prefix.rstrip("."), tree


def _in_order(entries: Sequence[StageConfig], path: Path) -> list[StageConfig]:
    """Behind what they need, otherwise in the file's order."""
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) < len(entries):
        names = [entry.name for entry in entries]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{path}: two stages are called {twice}; give each a name of its own")
    for entry in entries:
        unknown = [name for name in entry.needs if name not in by_name]
        if unknown:
            raise ConfigError(f"{path}: stage {entry.name} needs {unknown[0]}; stages are: {', '.join(by_name)}")
    sorter = TopologicalSorter({entry.name: entry.needs for entry in entries})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " needs ".join(reversed(error.args[1]))
        raise ConfigError(f"{path}: stages need each other in a circle: {circle}; cut it") from error
    done: list[StageConfig] = []
    left = list(entries)
    while left:
        ready = next(entry for entry in left if set(entry.needs) <= {earlier.name for earlier in done})
        done.append(ready)
        left.remove(ready)
    return done


def _stage(entry: StageConfig, config: CurriculumConfig, *, path: Path, earlier: Mapping[str, Stage]) -> Stage:
    kind = "train" if entry.kind == DECODER else entry.kind
    if kind not in KINDS:
        known = ", ".join([*KINDS, DECODER])
        raise ConfigError(f"{path}: stage {entry.name} is of kind {entry.kind}; it must be one of: {known}")
    where = f"stage {entry.name}"
    if isinstance(entry.config, str):
        tree: dict[str, Any] = read_tree(path.parent / entry.config)
    else:
        tree = OmegaConf.to_container(OmegaConf.create(entry.config))  # type: ignore[assignment]
    tree.pop("kind", None)
    for key, value in {**{f"launch.{k}": v for k, v in config.launch.items()}, **entry.overrides}.items():
        put(tree, key, value, where=where)
    sources = {key: _sources(entry, key, rule, earlier) for key, rule in entry.carries.items()}
    for key, rule in entry.carries.items():
        put(tree, key, _carried(rule, earlier, where=where), where=where)
    if entry.retries is not None:
        put(tree, "launch.max_crashes", entry.retries, where=where)
    job: AnyJob = validate(tree, KINDS[kind], origin=f"{path}: {where}")
    if entry.kind == DECODER and isinstance(job, TrainJob) and job.makes != "mask_decoder":
        raise ConfigError(
            f"{path}: {where} is of kind decoder, but objective.kind is {job.objective.kind}; set it to mask_decoder"
        )
    return Stage(entry.name, kind, job, entry.needs, sources, entry.retries)


def _sources(entry: StageConfig, key: str, rule: str, earlier: Mapping[str, Stage]) -> str:
    """The stage that a rule takes from; it must be needed, or it might not be done yet."""
    found = _CARRIED.search(rule)
    if found is None:
        raise ConfigError(
            f"stage {entry.name} carries {key}: {rule}; it must be as ${{stages.NAME.out}}; "
            "what is no other stage's belongs under `overrides`"
        )
    name = found[1]
    needed, todo = set(), list(entry.needs)
    while todo:
        needed.add(one := todo.pop())
        todo += earlier[one].needs
    if name not in needed:
        raise ConfigError(f"stage {entry.name} carries {key} from {name}, which it does not need; add {name} to needs")
    return name


def _carried(rule: str, earlier: Mapping[str, Stage], *, where: str) -> Any:
    def value(found: re.Match[str]) -> Any:
        known = flatten(earlier[found[1]].job.model_dump(mode="json"))
        if found[2] not in known:
            raise ConfigError(f"{where} carries {found[0]}, but stage {found[1]} has no key {found[2]}")
        return known[found[2]]

    whole = _CARRIED.fullmatch(rule)
    return value(whole) if whole else _CARRIED.sub(lambda found: str(value(found)), rule)


def put(tree: Any, key: str, value: Any, *, where: str) -> None:
    """Set a dotted key; a number is a place in a list."""
    *sections, last = key.split(".")
    for name in sections:
        if isinstance(tree, list):
            tree = tree[_place(tree, name, key, where)]
        else:
            if tree.get(name) is None:
                tree[name] = {}
            tree = tree[name]
        if not isinstance(tree, dict | list):
            raise ConfigError(f"{where}: {key} can't be set, since {name} is no section but {tree!r}")
    if isinstance(tree, list):
        tree[_place(tree, last, key, where)] = value
    else:
        tree[last] = value


def _place(tree: list[Any], name: str, key: str, where: str) -> int:
    if not name.isdigit() or int(name) >= len(tree):
        raise ConfigError(f"{where}: {key} can't be set, since {name} is no place in a list of {len(tree)}")
    return int(name)


def _refuse_shared_folders(curriculum: Curriculum) -> None:
    owners: dict[Path, str] = {curriculum.out.resolve(): "the curriculum itself"}
    for stage in curriculum.stages:
        other = owners.setdefault(stage.out.resolve(), stage.name)
        if other != stage.name:
            raise ConfigError(
                f"{curriculum.path}: out is {stage.out} for {other} and for {stage.name}; give each its own"
            )
