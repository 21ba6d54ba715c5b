"""The best evaluation of a run, for one definition of an evaluation. Numbers of two definitions are never compared.

A definition contains all settings that affect the numbers and may change between two starts: examples and cache,
timesteps, sampling and decoding of masks, whole videos, and the compared metric. Overlays and the interval are not
in it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from flowmask.trainer.config import RunConfig, in_todays_terms
from flowmask.trainer.state.run_folder import flatten
from flowmask.trainer.validation_config import ValidationConfig

Definition = dict[str, Any]
_OF_LOSSES, _OF_MASKS = ("examples", "timesteps"), ("jf_examples", "sampler")


def definition_of(
    settings: ValidationConfig, *, cache: str, decoder: str | None, whole_videos: Definition | None = None
) -> Definition:
    """The settings that an evaluation's numbers depend on, in JSON types.

    cache: fingerprint of the evaluated cache; decoder: hash of the mask decoder; None: the decoder is being trained
    whole_videos: the definition of their scores, if there are any
    """
    names = _OF_LOSSES + _OF_MASKS * (settings.jf_examples > 0)
    chosen = settings.model_dump(mode="json", include=set(names))
    chosen["timesteps"].sort()  # their losses are averaged
    more: Definition = {"mask_decoder": decoder} if settings.jf_examples and decoder else {}
    more |= {"whole_videos": whole_videos} if whole_videos is not None else {}
    more |= {"best": settings.best} if settings.best is not None else {}
    return {**chosen, "cache": cache, **more}


def metric_of(settings: ValidationConfig, found: Mapping[str, float]) -> str:
    """The metric that decides `best`; it may be missing in `found` if it is not measured each time."""
    return settings.best or ("eval_jf" if "eval_jf" in found else "eval_loss")


def is_better(metric: str, value: float, best: Mapping[str, Any] | None) -> bool:
    """Whether a value of a metric beats the best so far; a best of another metric does not count."""
    if not math.isfinite(value):
        return False
    if best is None or best["metric"] != metric:
        return True
    return value < best["value"] if metric == "eval_loss" else value > best["value"]


def short_hash(definition: Mapping[str, Any]) -> str:
    """A short hash of the definition, for the rows of evaluations.jsonl."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]


def best_so_far(
    state: Mapping[str, Any], config: RunConfig, now: Definition, *, say: Callable[[str], None]
) -> Mapping[str, Any] | None:
    """The best evaluation of an earlier start, if its definition is the same; else None, and a message line.

    state: the saved state of that start. Earlier versions saved no definition: it is derived from their config.
    """
    best = state.get("best")
    if best is None:
        return None
    if "definition" in best:
        changed = _differences(best["definition"], now)
    else:
        before = ValidationConfig.model_validate(in_todays_terms(state["config"]).get("evaluate", {}))
        old, new = (
            definition_of(settings, cache=str(settings.cache), decoder=None) for settings in (before, config.evaluate)
        )
        changed = _differences(old, new)
    if not changed:
        return {**best, "definition": now}
    say(
        f"evaluations differ from before ({'; '.join(changed)}): the best so far, {best['metric']} "
        f"{best['value']:.5g} of step {best['step']}, is not compared with them; checkpoints/best is kept until "
        "the next evaluation"
    )
    return None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = flatten(old), flatten(new)
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {_short(before, key)} -> {_short(after, key)}" for key in keys if before.get(key) != after.get(key)
    ]


def _short(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
