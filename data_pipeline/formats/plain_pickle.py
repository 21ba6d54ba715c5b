"""Pickles of plain data only (dict, list, tuple, str, numbers, bytes); nothing in the file is executed.

Raises DataError for a pickle that needs a class or a function, for other types, and for a value much larger than
its file.
"""

import os
import pickle
import struct
from pathlib import Path
from typing import Any, NoReturn

from flowmask.data_pipeline.formats.reading import reading
from flowmask.models.errors import DataError
from flowmask.models.stored.size import expanded

_MOST_PARTS, _PARTS_A_BYTE = 1_000_000, 16
_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})
_CONTAINERS = frozenset({dict, list, tuple})
# Exceptions that pickle raises for invalid bytes.
_DAMAGED: tuple[type[Exception], ...] = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError)
_DAMAGED += (AttributeError, OverflowError, MemoryError, RecursionError, struct.error)


class _PlainUnpickler(pickle._Unpickler):
    """Allows no class and no function: nothing can be called, so nothing in the file is executed.

    Uses the Python implementation: the C one allocates a table as long as the largest object number in the file.
    """

    def __init__(self, file: Any, path: Path):
        super().__init__(file, encoding="utf-8")  # for strings of Python 2
        self._path = path

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(
            f"{self._path}: the pickle asks for {module}.{name}; only plain data is read (dict, list, tuple, "
            "str, numbers, bytes). Get the file from its publisher"
        )


def read_plain_pickle(path: Path) -> Any:
    """The value of a pickle; raises DataError if it is missing, damaged or not plain."""
    with reading(path, what="pickle", errors=_DAMAGED) as file:
        content = _PlainUnpickler(file, path).load()
        _refuse_other_types(content, path)
        if expanded(content) > _MOST_PARTS + _PARTS_A_BYTE * os.fstat(file.fileno()).st_size:
            raise ValueError("it has too many references to its own parts")
    return content


def _refuse_other_types(content: Any, path: Path) -> None:
    """Raises DataError for types that opcodes make without a class: sets and byte arrays."""
    seen: set[int] = set()
    stack: list[Any] = [[content]]
    while stack:
        for item in stack.pop():
            kind = type(item)
            if kind in _PLAIN or id(item) in seen:
                continue
            if kind not in _CONTAINERS:
                raise DataError(f"{path}: the pickle holds a {kind.__name__}; only plain data is read")
            seen.add(id(item))
            stack.append([*item.keys(), *item.values()] if kind is dict else item)
