"""Reads a YAML config and dotted overrides into one strict, frozen job, or says in one line what is wrong.

Order of strength: defaults < file < command line. Every section belongs to the room that reads it; this file
owns the `launch` section and the jobs that are made of all of them.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError, model_validator

from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.launch.configs import find_config
from flowmask.models.config import Section
from flowmask.models.errors import ConfigError
from flowmask.trainer.config import RunConfig, accumulation_steps
from flowmask.trainer.objectives import of_one_kind
from flowmask.trainer.score.evaluate_config import EvaluateConfig


class LaunchConfig(Section):
    """How many processes, and where. `local`: this machine; `slurm`: through submitit; `debug`: this very process."""

    cluster: Literal["local", "slurm", "debug"] = "local"
    nodes: int = Field(1, ge=1)
    processes_per_node: int = Field(1, ge=1, description="one a GPU; on a CPU at most one a core")
    array: int = Field(1, ge=1, description="cache builds: so many tasks, each of `nodes` nodes, share the work")
    array_parallel: int | None = Field(None, ge=1, description="array tasks that may run at once; None: all")
    gpus_per_node: int | None = Field(
        None, ge=0, description="None: one a process, of a partition that has GPUs; 0: a CPU job"
    )
    cpus_per_node: int | None = Field(
        None,
        ge=1,
        description="None: for each process one and its reading threads (data.threads, cache.decode_threads), "
        "at most all of the partition's smallest node",
    )
    mem_gb: float | None = Field(None, gt=0, description="memory of a node; None: the partition's default")
    time_min: int | None = Field(None, ge=1, description="time limit; None: the partition's default")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: tuple[str, ...] = Field((), description="shell lines before the job: modules, variables")
    srun_args: tuple[str, ...] = Field((), description="passed to srun, for example a container's image")
    sbatch_args: dict[str, str] = Field({}, description="any other option of sbatch, by its long name")
    signal_margin_s: int = Field(90, ge=1, description="time to save before a time limit")
    max_preemptions: int = Field(100, ge=0)
    max_timeouts: int = Field(100, ge=0)
    max_crashes: int = Field(2, ge=0, description="starts after a crash before the job ends for good")

    @model_validator(mode="after")
    def _fits(self) -> "LaunchConfig":
        if self.cluster == "local" and self.nodes != 1:
            raise ValueError(f"launch.nodes is {self.nodes}; launch.cluster=local is this machine alone: 1")
        if self.cluster != "slurm" and self.array != 1:
            raise ValueError(
                f"launch.array is {self.array}; it splits a cache build on SLURM: set launch.cluster=slurm, "
                "or on this machine launch.processes_per_node"
            )
        if self.cluster == "slurm" and self.time_min and self.time_min * 60 <= self.signal_margin_s:
            raise ValueError(
                f"launch.signal_margin_s is {self.signal_margin_s}; it must be less than "
                f"launch.time_min {self.time_min} x 60 s"
            )
        return self

    @property
    def world_size(self) -> int:
        """Processes that train or evaluate together."""
        return 1 if self.cluster == "debug" else self.nodes * self.processes_per_node


def _refuse_array(launch: LaunchConfig) -> None:
    if launch.array != 1:
        raise ValueError(f"launch.array is {launch.array}; only a cache build is split into array tasks: 1")


class CacheJob(CacheBuildConfig):
    """`flowmask cache build`."""

    launch: LaunchConfig = LaunchConfig()


class TrainJob(RunConfig):
    """`flowmask train`."""

    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _batch_fits(self) -> "TrainJob":
        _refuse_array(self.launch)
        accumulation_steps(self.train, self.launch.world_size)
        gpus, ranks = self.launch.gpus_per_node, self.launch.processes_per_node
        if gpus and ranks > gpus:
            raise ValueError(
                f"launch.processes_per_node is {ranks}, launch.gpus_per_node {gpus}; each rank of a training "
                "needs a GPU of its own: set both to the same number"
            )
        return self


class EvaluateJob(EvaluateConfig):
    """`flowmask evaluate`."""

    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _one_task(self) -> "EvaluateJob":
        _refuse_array(self.launch)
        return self


Job = TypeVar("Job", bound=BaseModel)


def load_job(path: Path, kind: type[Job], overrides: Sequence[str] = ()) -> Job:
    """Read `path`, apply `key.path=value` overrides, validate as `kind`.

    Raises ConfigError with one line that names the key, its value and what is allowed.
    """
    return validate(read_tree(path, overrides), kind, origin=str(path))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[Any, Any]:
    """The keys of `path` with overrides applied, not yet validated as any kind of job."""
    path = find_config(path)
    try:
        loaded = _load_with_base(path)
        data = OmegaConf.to_container(_overridden(loaded, overrides), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"config {path} is not valid YAML: {_one_line(error)}") from error
    assert isinstance(data, dict)
    return data


def _load_with_base(path: Path, *, above: tuple[Path, ...] = ()) -> DictConfig:
    """The keys of a file over those of the file that its `base` names, a path from its own folder."""
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig) or not loaded:
        raise ConfigError(f"config {path} holds no keys; it must be a YAML mapping")
    if isinstance(objective := loaded.get("objective"), DictConfig):
        loaded["objective"] = of_one_kind(objective)
    base = loaded.pop("base", None)
    if base is None:
        return loaded
    below = (path.parent / str(base)).resolve()
    if not below.is_file() or below in above:
        why = "is based on itself" if below in above else "does not exist"
        raise ConfigError(f"config {path}: base is {base}, which {why}; give a path from {path.parent}")
    merged = OmegaConf.merge(_load_with_base(below, above=(*above, path.resolve())), loaded)
    assert isinstance(merged, DictConfig)
    return merged


def validate(data: dict[Any, Any], kind: type[Job], *, origin: str) -> Job:
    """`data` as a `kind`, or a ConfigError that names the first wrong key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = [_explain(kind, dict(item)) for item in error.errors(include_url=False)]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{origin}: {problems[0]}{more}") from error


def _overridden(config: DictConfig, overrides: Sequence[str]) -> Any:
    """The config with each KEY=VALUE in it; a number in a key is a place in a list."""
    result: Any = config
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override {item!r} is not KEY=VALUE, for example train.lr=1e-4")
        key, change = item.partition("=")[0], OmegaConf.from_dotlist([item])
        try:
            if any(part.isdigit() for part in key.split(".")):
                OmegaConf.update(result, key, OmegaConf.select(change, key), merge=True, force_add=True)
            else:
                result = OmegaConf.merge(result, change)
        except (TypeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"override {item!r} does not fit the file; a list is changed as a whole or by place, as data.0.root=..."
            ) from error
    return result


def _explain(kind: type[BaseModel], item: dict[str, Any]) -> str:
    """One problem of pydantic's as one line."""
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    match item["type"]:
        case "extra_forbidden":
            return f"unknown key {key}{_nearest(kind, location)}"
        case "missing":
            return f"key {key} is missing; set it in the file or as {key}=VALUE"
        case "value_error":
            message = _one_line(item["ctx"]["error"])
            return message if not key or key in message else f"{key}: {message}"
        case _:
            return f"{key} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _nearest(kind: type[BaseModel], location: list[str]) -> str:
    """The right key nearest to an unknown one: of its very name anywhere, in its own section, then anywhere."""
    section: type[BaseModel] | None = kind
    for part in location[:-1]:
        section = _section(section.model_fields[part].annotation) if section and part in section.model_fields else None
    if section is None:
        return ""
    prefix = "".join(f"{part}." for part in location[:-1])
    siblings = [prefix + name for name in section.model_fields]
    wanted = ".".join(location)
    close = [key for key in _all_keys(kind) if key.rpartition(".")[2] == location[-1]][:1]
    close = close or difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.6)
    close = close or difflib.get_close_matches(wanted, _all_keys(kind), n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; {prefix.rstrip('.') or 'the config'} knows {', '.join(sorted(section.model_fields))}"


def _all_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        keys += _all_keys(section, f"{prefix}{name}.") if section else [prefix + name]
    return keys


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also through Optional."""
    candidates = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
    if get_origin(annotation) not in (None, Union) and not any(isinstance(c, type) for c in candidates):
        return None
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
