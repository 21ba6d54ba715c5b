"""Counts the filesystem calls of this process, and the names in its listings.

Not counted: files that compiled libraries open (safetensors: one file a clip), reads and writes of open files.
"""

import builtins
import io
import os
from collections import Counter
from typing import Any, Self

_CALLS = (
    *("stat", "lstat", "open", "link", "symlink", "readlink", "rename", "replace", "remove", "unlink", "mkdir"),
    *("rmdir", "utime", "truncate", "fsync", "listdir", "scandir"),
)
_NAMES_PER_QUESTION = 256  # a listing counts as one call, and one more for each 256 names


def asked_of(count: Counter[str]) -> float:
    """Number of filesystem calls; listings count by their size."""
    return sum(count.values()) - count["names"] * (1 - 1 / _NAMES_PER_QUESTION)


class Questions:
    """Calls by name for each pass; `begin` starts the named pass."""

    def __init__(self) -> None:
        self.passes: dict[str, Counter[str]] = {}
        self._real: dict[str, Any] = {}
        self.begin("start")

    def begin(self, name: str) -> None:
        self._now = self.passes.setdefault(name, Counter())

    def listen(self) -> None:
        """Count from now on, in every thread of this process."""
        self._real = {name: getattr(os, name) for name in _CALLS} | {"io": io.open}
        for name in _CALLS:
            setattr(os, name, self._counted(name, self._real[name]))
        builtins.open = io.open = self._counted("open", self._real["io"])  # type: ignore[assignment]

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for name in _CALLS:
            setattr(os, name, self._real[name])
        builtins.open = io.open = self._real["io"]

    def _counted(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._now[name] += 1
            result = real(*args, **kwargs)
            return _Names(result, self._now) if name == "scandir" else result

        return call


class _Names:
    """A listing that counts its names."""

    def __init__(self, entries: Any, count: Counter[str]):
        self._entries, self._count = entries, count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        entry = next(self._entries)
        self._count["names"] += 1
        return entry

    def close(self) -> None:
        self._entries.close()
