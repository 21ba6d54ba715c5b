"""Decides which settings a resume may change, for training, preflight, curricula and `tune`.

The config field of a key says whether it may change (`MayChange` of models/config.py; `OnlyRounds`: before the first
checkpoint). A cache may move, but not change: its fingerprint is compared; for a mixture also the weights.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flowmask.data_pipeline.cache.manifest import Fingerprint
from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read.batches import open_reader
from flowmask.models.config import MayChangeOnResume, OnlyRoundsOtherwise
from flowmask.models.errors import CheckpointError
from flowmask.trainer.config import RunConfig, in_todays_terms
from flowmask.trainer.state.run_folder import flatten, plain


def settled(config: RunConfig, state: Mapping[str, Any]) -> RunConfig:
    """The config in effect from now on; state: saved by an earlier start, empty if there was none.

    The schedule's length is `train.steps` of the first start unless the config names one; a resume keeps it.
    """
    first = state["config"]["train"]["schedule_steps"] if state else config.train.steps
    train = config.train.model_copy(update={"schedule_steps": config.train.schedule_steps or first})
    return config.model_copy(update={"train": train})


def refuse_other_config(config: RunConfig, state: Mapping[str, Any]) -> None:
    """Raises CheckpointError with every key that differs from the run's but must not.

    If `decay_at_epochs` is not converted to steps yet (length.py), it is compared later, when the cache is known.
    """
    new = settled(config, state).model_dump(mode="json", include=set(RunConfig.model_fields))
    old = in_todays_terms(state["config"])
    free = _free_keys() | ({"train.decay_at_steps"} if config.train.decay_at_epochs else frozenset())
    _refuse(
        [d for key, d in _differences(old, new) if not any(f"{key}.".startswith(f"{prefix}.") for prefix in free)],
        out=config.out,
        what="config",
    )


def may_choose(key: str, *, begun: bool) -> bool:
    """Whether a run may change a dotted key without changing what it learns; begun: it has a checkpoint."""
    return key in _free_keys() or (not begun and key in _free_keys(mark=OnlyRoundsOtherwise))


def refuse_other_cache(config: RunConfig, state: Mapping[str, Any], now: Fingerprint) -> None:
    """Raises CheckpointError with all differences of the cache."""
    before = state["fingerprint"]
    _refuse([said for _, said in _differences(before["fields"], now.fields)], out=config.out, what="cache")
    if before != now.model_dump(mode="json"):
        raise CheckpointError(f"{config.out} was trained on another cache than {config.data.caches}")


def fingerprint_of(data: LoaderConfig) -> Fingerprint | None:
    """The fingerprint of a config's data; None for a stream or a server, which only the run itself opens."""
    if data.mode == "stream" or data.asks_a_server:
        return None
    reader = open_reader(data, check=False)
    try:
        return reader.manifest.fingerprint
    finally:
        reader.close()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every key that differs, and `key: old -> new`."""
    before, after = flatten(plain(old)), flatten(plain(new))
    return [
        (key, f"{key}: {before.get(key)} -> {after.get(key)}")
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _refuse(differences: list[str], *, out: Path, what: str) -> None:
    if differences:
        raise CheckpointError(
            f"{out} holds a run with another {what}: {'; '.join(differences)}. Give the old values, "
            f"or start a new run with another out (model.init={out} starts from these weights)"
        )


@cache
def _free_keys(
    section: type[BaseModel] = RunConfig, prefix: str = "", *, mark: type = MayChangeOnResume
) -> frozenset[str]:
    """Dotted keys and sections that have a mark."""
    found: set[str] = set()
    for name, field in section.model_fields.items():
        if mark in field.metadata:
            found.add(f"{prefix}{name}")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _free_keys(field.annotation, f"{prefix}{name}.", mark=mark)
    return frozenset(found)
