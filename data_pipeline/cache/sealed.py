"""JSON files that carry their own hash, so that a damaged one is told from what it speaks of.

A sealed file is the one JSON spelling of an object with a last word, `seal`: the SHA-256 of the rest. One
changed bit anywhere in it breaks the seal or the spelling.
"""

import hashlib
import json
from typing import Any

from flowmask.data_pipeline.cache.shards import to_json

_SEAL = "seal"


def seal(value: dict[str, Any]) -> bytes:
    """The bytes of a sealed file that holds `value`."""
    return to_json({**value, _SEAL: hashlib.sha256(to_json(value)).hexdigest()})


def unseal(content: bytes) -> dict[str, Any]:
    """What `seal` was given; ValueError if a byte has changed since."""
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    value.pop(_SEAL, None)
    if seal(value) != content:
        raise ValueError("its seal is broken: a byte has changed since it was written")
    return value
