"""The facts about a training that MLflow gets in addition to its numbers: user, objective, data, machine, code."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from flowmask.data_pipeline.read.batches import Reader, caches_of
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.read.stream import StreamReader
from flowmask.models.safe.secrets import masked_line, masked_uri
from flowmask.models.stored.typed import read_yaml
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.objectives import objective_class
from flowmask.trainer.state.run_folder import CONFIG, flatten
from flowmask.trainer.track.plans import RunFacts, common_tags
from flowmask.trainer.track.spool import DatasetFacts

_DIGEST_CHARACTERS = 36  # MLflow's limit


def params_of(config: RunConfig) -> dict[str, Any]:
    """The keys of a config that determine what is learned, by dotted name; None for an unused key.

    Keys about output, launching and tracking are no params: they are in tags and in config.yaml.
    """
    objective = objective_class(config.objective.kind)
    tree = config.model_dump(mode="json", exclude={"out", "launch", "tracking"})
    if not config.evaluate.wanted:
        del tree["evaluate"]
    if "text" not in objective.needs:
        del tree["model"]["text_tokens"]
    if objective.makes != "dit":
        del tree["model"]["mask_decoder"]
    return flatten(tree)


def facts_of(config: RunConfig, training: Reader, held_out: Any = None) -> RunFacts:
    """All facts about this start. held_out: the reader of evaluations; None without evaluations."""
    datasets = datasets_of(training, held_out)
    names = dict.fromkeys(one.name for one in datasets if one.context == "training")
    tags = {"objective": config.objective.kind, "dataset": ", ".join(names), "gpus": _gpus()}
    if config.tracking.stage is not None:
        tags["stage"] = config.tracking.stage
    tags |= {"folder": str(config.out.resolve())} | common_tags(f"flowmask train {config.out.resolve() / CONFIG}")
    return RunFacts(params_of(config), tags, datasets)


def _gpus() -> str:
    """Number and name of the training devices: `8 x NVIDIA H200`; `none` on CPUs."""
    device = distributed.device()
    if device.type != "cuda":
        return "none"
    return f"{distributed.world_size()} x {torch.cuda.get_device_name(device)}"


def datasets_of(training: Reader, held_out: Any = None) -> tuple[DatasetFacts, ...]:
    """The caches of training and of evaluation; equal ones once. held_out: the evaluation's reader."""
    found: dict[tuple[str, str], DatasetFacts] = {}
    for context, reader in (("training", training), ("evaluation", held_out)):
        for cache in caches_of(reader) if reader is not None else ():
            facts = _dataset(cache, context)
            found.setdefault((facts.name, facts.digest), facts)
    return tuple(found.values())


def _dataset(cache: CacheReader | StreamReader, context: Any) -> DatasetFacts:
    manifest, place = cache.manifest, cache.config.cache if isinstance(cache, StreamReader) else cache.place
    counts = {name: getattr(manifest, name) for name in ("examples", "clips", "views")}
    return DatasetFacts(
        name=_dataset_name(place),
        digest=manifest.fingerprint.total[:_DIGEST_CHARACTERS],
        fingerprint=manifest.fingerprint.total,
        place=str(place.resolve()) if isinstance(place, Path) else masked_line(masked_uri(str(place))),
        context=context,
        counts=counts | {"shards": len(manifest.shards), "bytes": sum(shard.size for shard in manifest.shards)},
    )


def _dataset_name(place: object) -> str:
    """`mevis/train` if the cache's config.yaml has it, else the name of the cache's folder."""
    if isinstance(place, Path):
        try:
            found = list(_sources(read_yaml(place / "config.yaml")["data"]))
        except (OSError, ValueError, KeyError, TypeError):
            found = []
        if found:
            return " + ".join(found)
    last = masked_line(masked_uri(str(place))).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "_", last) or "cache"


def _sources(data: Any) -> Iterator[str]:
    for one in [data] if isinstance(data, Mapping) else data:
        yield f"{one['source']}/{one['split']}"
