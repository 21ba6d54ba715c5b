"""JSON of a dataset: an object that names a key twice is refused, since Python's json would drop one of the two."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.formats.reading import reading

BOM = b"\xef\xbb\xbf"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its members; raises ValueError if two have the same name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {name[:40]!r} is in one object {times} times")
    return found


def parse(content: bytes, *, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value of a JSON text; ValueError or RecursionError if it is not JSON."""
    if object_hook is None:
        return json.loads(content, object_pairs_hook=unique_keys)
    return json.loads(content, object_pairs_hook=lambda pairs: object_hook(unique_keys(pairs)))


def read_json(path: Path, *, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parsed JSON; DataError for a file that is missing or does not parse.

    object_hook: makes each object smaller as it is parsed, for files that are too large to hold as a whole.
    """
    with reading(path, what="JSON") as file:
        return parse(file.read(), object_hook=object_hook)
