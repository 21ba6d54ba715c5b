"""The size of a value if every part counts at each of its places: 300 bytes can name one list 2^40 times."""

from collections.abc import Iterable
from typing import Any

_UNCOUNTED = 1 << 62  # or more


def _parts(value: Any) -> Iterable[Any]:
    """The parts of plain data."""
    if isinstance(value, dict):
        return (part for item in value.items() for part in item)
    return value if isinstance(value, list | tuple) else ()


def expanded(value: Any) -> int:
    """Number of values in `value`; each counts as often as it is reached, but a value inside itself counts once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[tuple[Any, list[Any] | None]] = [(value, None)]
    while stack:
        item, inner = stack.pop()
        if inner is not None:
            sizes[id(item)] = min(_UNCOUNTED, 1 + sum(sizes.get(id(part), 1) for part in inner))
        elif id(item) not in seen and (found := list(_parts(item))):
            seen.add(id(item))
            stack.append((item, found))
            stack += [(part, None) for part in found if isinstance(part, dict | list | tuple)]
    return sizes.get(id(value), 1)
