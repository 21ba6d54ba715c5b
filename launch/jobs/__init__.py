"""The jobs by name: each kind is a class here with the facts that the launcher needs.

Imports launch/config and launch/progress and, when a job runs, the room that does the work.
A new kind is a file here and an entry in KINDS.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from flowmask.launch.config import as_written, read_tree, validate
from flowmask.launch.jobs.cache import CacheJob
from flowmask.launch.jobs.evaluate import EvaluateJob
from flowmask.launch.jobs.job import Job, Resolved
from flowmask.launch.jobs.train import TrainJob
from flowmask.launch.overlay import split
from flowmask.models.errors import ConfigError
from flowmask.models.process import without

# A config without `kind` has the first kind here that recognises it.
KINDS: dict[str, type[Job]] = {kind.KIND: kind for kind in (TrainJob, EvaluateJob, CacheJob)}
# A file with one of these keys is a list of jobs, or an overlay: key -> (name, command).
_COMPOSED = {
    "rows": ("study", "reproduce"),
    "stages": ("curriculum", "curriculum"),
    "paths": ("overlay", "COMMAND CONFIG"),
}
# diffusers imports them for its own adapters, quantizers, schedulers and pipelines.
UNUSED = ("peft", "bitsandbytes", "scipy", "transformers")
AnyJob = TypeVar("AnyJob", bound=Job)
_NAMES = {name: kind for kind in KINDS.values() for name in (kind.KIND, *kind.ALIASES)}


def kind_of(tree: dict[Any, Any], *, origin: str) -> tuple[type[Job], str]:
    """The kind of job of a config, and how it was recognised. Raises ConfigError if it can't be recognised."""
    if "kind" in tree:
        named = str(tree["kind"])
        if named not in _NAMES:
            raise ConfigError(f"{origin}: kind is {named}; it must be {', '.join(_NAMES)}")
        return _NAMES[named], f"kind is {named}"
    for kind in KINDS.values():
        if because := kind.recognised_by(tree):
            return kind, because
    raise ConfigError(f"{origin}: the kind of this job is unknown; add kind: one of {', '.join(_NAMES)}")


def refuse_other_kind(keys: Mapping[Any, Any], wanted: str, *, path: Path) -> None:
    """Raises ConfigError, with the right command, for a file of another kind than `wanted`.

    A file has a kind if that kind recognises it and knows all of its sections.
    wanted: a kind of job, "curriculum", "study", or "job" for any kind of job
    """
    found = next((composed for key, composed in _COMPOSED.items() if key in keys), None)
    if found is None and wanted != "job" and not (wanted in KINDS and KINDS[wanted].recognised_by(keys)):
        known = (
            kind for kind in KINDS.values() if kind.recognised_by(keys) and kind.model_fields.keys() >= keys.keys()
        )
        found = next(((kind.KIND, kind.COMMAND) for kind in known), None)
    if found is not None and found[0] != wanted:
        a = "an" if found[0] in (EvaluateJob.KIND, "overlay") else "a"
        raise ConfigError(f"{path} is {a} {found[0]} config: run `flowmask {found[1]} {path}`")


def read_keys(
    path: Path, arguments: Sequence[str] = (), *, refuse: Callable[[Mapping[Any, Any]], None] = lambda keys: None
) -> dict[Any, Any]:
    """The keys of a job's config with overlays and KEY=VALUE applied, not yet validated."""
    overlays, overrides = split(arguments)

    def over(config: DictConfig) -> DictConfig:
        keys = as_written(config)
        if overlays:
            refuse(keys)
            kind, _ = kind_of(keys, origin=str(path))
            for overlay in overlays:
                config = overlay.over(config, kind.KIND)
        return config

    return read_tree(path, overrides, over=over, refuse=refuse)


def load_kind(path: Path, kind: type[AnyJob], overrides: Sequence[str] = ()) -> AnyJob:
    """The job of a config that must have this kind. Raises ConfigError with one line."""
    tree = read_keys(path, overrides, refuse=partial(refuse_other_kind, wanted=kind.KIND, path=path))
    tree.pop("kind", None)
    return validate(tree, kind, origin=str(path))


def load_any(config: Path, overrides: Sequence[str] = ()) -> tuple[Job, str]:
    """The job of a config of any kind, and how its kind was recognised. Raises ConfigError with one line."""
    tree, kind, because = read_any(config, overrides)
    return validate(tree, kind, origin=str(config)), because


def read_any(config: Path, overrides: Sequence[str] = ()) -> tuple[dict[Any, Any], type[Job], str]:
    """The keys of a config of any kind, not yet validated; its kind; and how that was recognised."""
    tree = read_keys(config, overrides, refuse=partial(refuse_other_kind, wanted="job", path=config))
    kind, because = kind_of(tree, origin=str(config))
    tree.pop("kind", None)
    return tree, kind, because


def import_diffusers() -> None:
    """Import diffusers' Wan without what no job uses of it. Only for a process of FlowMask's own."""
    with without(*UNUSED):
        import_module("diffusers.models.transformers.transformer_wan")


def run_rank(kind: str, resolved: Resolved, *, own_process: bool = False) -> int:
    """Run one rank of a job in this process. Raises ConfigError if its GPU is missing or has too little memory.

    own_process: nothing else runs here, so diffusers may be imported without the parts that no job uses
    """
    from flowmask.models.device import gpu_holds, require_gpu

    job = validate(resolved, KINDS[kind], origin=f"{kind} job")
    if (promised := job.launch.gpus_per_node) and job.computes_on != "cpu":
        require_gpu(f"launch.gpus_per_node is {promised}", otherwise="set launch.gpus_per_node=0")
    if own_process:
        import_diffusers()
    with gpu_holds(f"this {kind} job", fix=job.LESS_MEMORY):
        code = job.work(resolved, rank=int(os.environ.get("RANK", "0")), world=int(os.environ.get("WORLD_SIZE", "1")))
    return code or 0
