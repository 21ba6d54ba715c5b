"""JSON within limits, and JSON files that contain their own hash, so that damage is found in the file itself.

A sealed file is an object with one more member, `seal`: the SHA-256 of the rest in its one short spelling. A kind of
file that once had no seal has a version; from the first sealed version on, a file without a seal is
damaged. A seal finds damage; it is no signature.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

SEAL = "seal"


def to_json(value: Any) -> bytes:
    """The one short spelling of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse_json(content: bytes | str, *, number: Callable[[str], Any] = float) -> Any:
    """A JSON value; ValueError for everything else, also for too deep nesting. number: makes fractions."""
    try:
        return json.loads(content, parse_float=number, parse_constant=number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_object(content: bytes | str) -> dict[str, Any]:
    """A JSON object; ValueError for everything else."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def seal(value: dict[str, Any]) -> bytes:
    """The bytes of a sealed file with `value`, in the short spelling."""
    return to_json(sealed(value))


def seal_readable(value: dict[str, Any]) -> bytes:
    """As `seal`, but one line per member, in the order of `value`."""
    value = json.loads(json.dumps(value))  # as a reader gets it: keys are strings, tuples are lists
    return json.dumps(sealed(value), indent=1, ensure_ascii=False).encode() + b"\n"


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """`value`, in JSON types, with its seal as the last member."""
    return {**value, SEAL: _hash(value)}


def unseal(content: bytes) -> dict[str, Any]:
    """The sealed value in the short spelling; ValueError if a byte has changed."""
    value = parse_object(content)
    value.pop(SEAL, None)
    if seal(value) != content:
        raise ValueError("its seal is broken: a byte has changed since it was written")
    return value


def unseal_since(value: dict[str, Any], *, version: str, first: int, where: object) -> dict[str, Any]:
    """The members of a file whose `version` had no seal before `first`, without the seal.

    ValueError if a sealed value has changed, or a version that must be sealed is not. Reports once, in one line, that
    an older file `where` has none.
    """
    rest = {name: member for name, member in value.items() if name != SEAL}
    if SEAL in value:
        if value[SEAL] != _hash(rest):
            raise ValueError("its seal is broken: something has changed since it was written")
        return rest
    known = rest.get(version)
    if type(known) is not int or known >= first:
        raise ValueError(f"it has no seal, which {version} {known!r} must have")
    _say_unsealed(str(where))
    return rest


def _hash(value: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(to_json(value)).hexdigest()
    except (RecursionError, TypeError):
        raise ValueError("it is nested too deep, or no JSON") from None


@lru_cache
def _say_unsealed(where: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("flowmask").warning(
            "%s has no seal, as an older flowmask wrote it: damage in it may pass unseen", where
        )
