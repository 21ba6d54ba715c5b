"""The best evaluation of a run, kept for each definition of an evaluation: numbers of two are never compared.

A definition is everything that shapes the numbers and may change between two starts: which examples of which cache,
where on the path, and how masks are sampled and decoded. Overlays and how often it is done are not in it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from flowmask.trainer.config import RunConfig, ValidationConfig, in_todays_terms
from flowmask.trainer.state.run_folder import flatten

Definition = dict[str, Any]
_OF_LOSSES, _OF_MASKS = ("examples", "timesteps"), ("jf_examples", "sampler")


def definition_of(settings: ValidationConfig, *, cache: str, decoder: str | None) -> Definition:
    """What an evaluation's numbers depend on, in JSON's types.

    cache: what is read, by its fingerprint; decoder: what turns latents into masks, by its hash; None: what is trained
    """
    names = _OF_LOSSES + _OF_MASKS * (settings.jf_examples > 0)
    chosen = settings.model_dump(mode="json", include=set(names))
    chosen["timesteps"].sort()  # their losses are averaged
    return {**chosen, "cache": cache, **({"mask_decoder": decoder} if settings.jf_examples and decoder else {})}


def short_hash(definition: Mapping[str, Any]) -> str:
    """A name of the definition for the rows of evaluations.jsonl."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]


def best_so_far(
    state: Mapping[str, Any], config: RunConfig, now: Definition, *, say: Callable[[str], None]
) -> Mapping[str, Any] | None:
    """The best evaluation of an earlier start, if it was measured as evaluations are now; else None, and a line.

    state: what that start saved. Earlier versions saved no definition: theirs is that of their config.
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
        f"evaluations are other ones than before ({'; '.join(changed)}): the best so far, {best['metric']} "
        f"{best['value']:.5g} of step {best['step']}, is not compared with them; checkpoints/best is that one until "
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
