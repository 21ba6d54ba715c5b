"""Entries by name: one class per file of a folder, or one that an installed package names in an entry point.

Nothing is imported before it is requested.
"""

import difflib
import inspect
import pkgutil
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

from flowmask.models import plugins
from flowmask.models.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """The subclasses of `base` in the files of `package`, each with its file's name, and those of `group`."""

    def __init__(self, package: str, base: type[T], *, group: str, key: str) -> None:
        """key: config key of the name, for messages."""
        self._package, self._base, self._group, self._key = package, base, group, key

    def names(self) -> list[str]:
        """Every known name, also of installed packages."""
        return sorted({*filter(self._of_file, self._files()), *self.installed()})

    def installed(self) -> list[str]:
        """The names of installed packages' entry points."""
        return plugins.names(self._group)

    def get(self, name: str, *, key: str | None = None) -> type[T]:
        """The class called `name`; ConfigError lists the known names and the nearest, or the fault of an entry point.

        key: the config key of the name, if not the registry's own
        """
        key = key or self._key
        if (ours := self._of_file(name)) is not None:
            return ours
        found = plugins.load(self._group, name)
        if found is None:
            near = difflib.get_close_matches(name, self.names(), n=1)
            meant = f". Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key} is {name!r}; known: {', '.join(self.names())}{meant}")
        if not self._is_entry(found):
            lacks = ", ".join(sorted(getattr(found, "__abstractmethods__", ()))) or f"the base {self._base.__name__}"
            raise ConfigError(f"{key} is {name!r}, but {self._group} names {found!r}, which lacks {lacks}")
        entry: type[T] = found
        return entry

    def _files(self) -> frozenset[str]:
        return _modules(Path(str(import_module(self._package).__file__)).parent)

    def _of_file(self, name: str) -> type[T] | None:
        """The entry in the file of this name, if there is one: other files of the folder are helpers."""
        if name not in self._files():
            return None
        module = import_module(f"{self._package}.{name}")
        return next((c for c in vars(module).values() if self._is_entry(c) and c.__module__ == module.__name__), None)

    def _is_entry(self, found: object) -> bool:
        below = inspect.isclass(found) and issubclass(found, self._base) and found is not self._base
        return below and not inspect.isabstract(found)


@cache
def _modules(folder: Path) -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules([str(folder)]))
