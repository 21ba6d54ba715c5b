"""JSON of a dataset: an object with a repeated key is refused, because Python's json would drop one of the two."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.formats.reading import reading, shown
from flowmask.models.errors import DataError

BOM = b"\xef\xbb\xbf"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its members; raises ValueError if two have the same name."""
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
    """Parsed JSON; DataError for a file that is missing or invalid.

    object_hook: makes each object smaller during parsing, for files that are too large to hold as a whole.
    """
    with reading(path, what="JSON") as file:
        return parse(file.read(), object_hook=object_hook)


def json_lines(path: Path, *, shape: str) -> Iterator[tuple[str, bytes]]:
    """The position and bytes of each non-empty line of a JSONL.

    shape: describes a line; used in the DataError for a file whose first line is no JSON, such as a CSV. Otherwise
    each of its lines would be a separate mistake.
    """
    with reading(path, what="JSONL") as file:
        lines = enumerate(file.read().removeprefix(BOM).split(b"\n"), 1)
    known = False
    for number, line in lines:
        if line.strip():
            if not (known or line.lstrip().startswith(b'{"') or _is_json(line)):
                said = shown(line.decode(errors="replace").strip())
                raise DataError(f"{path}:{number}: no valid JSON ({said}); {shape}")
            known = True
            yield f"{path}:{number}", line


def _is_json(line: bytes) -> bool:
    try:
        parse(line)
    except (ValueError, RecursionError):
        return False
    return True
