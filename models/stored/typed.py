"""FlowMask's small files as typed values: JSON of a type, YAML as plain data. ValueError names the fault."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import parse_json

T = TypeVar("T")
_MOST_YAML = 1 << 16  # bytes; parsing takes seconds for each MB
_MOST_OPEN = 100  # brackets of a YAML text that are open at once; parsing takes the square of them
_TOO_LARGE = 1e150  # the product of two numbers below it is finite
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def read_as(path: Path, kind: type[T]) -> T:
    """The JSON value in a file as a `kind`; OSError, or ValueError in one line."""
    return parse_as(read_regular(path), kind)


def parse_as(content: bytes, kind: type[T]) -> T:
    """JSON as a `kind`; ValueError in one line."""
    return validated(parse_json(content), kind)


def validated(value: Any, kind: type[T]) -> T:
    """Plain data as a `kind`; ValueError in one line."""
    try:
        found: T = _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(": ".join([*map(str, first["loc"][:1]), first["msg"]])[:200]) from None
    return found


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number (no boolean, no NaN) that can be weighted and summed."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE


def read_yaml(path: Path) -> Any:
    """The value in a YAML file; OSError, or ValueError if it is not YAML."""
    content = read_regular(path, limit=_MOST_YAML)
    refuse_deep_yaml(content)
    try:
        return yaml.safe_load(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (yaml.YAMLError, TypeError, AttributeError, LookupError, OverflowError) as error:
        raise ValueError(f"no YAML ({' '.join(str(error).split())[:200]})") from None


def refuse_deep_yaml(content: bytes) -> None:
    """ValueError for a YAML text with too many brackets open at once, as in a damaged file; 1,000 take 4 s."""
    deep = 0
    for bracket in re.findall(rb"[\[\]{}]", content):
        deep += 1 if bracket in b"[{" else -1
        if deep > _MOST_OPEN:
            raise ValueError(f"it is nested too deep: {deep} brackets are open at once")
