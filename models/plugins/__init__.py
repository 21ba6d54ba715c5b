"""Entries by name: files of a folder (`registry`), and entry points of installed packages, imported on request.

Imports `models.errors`. A new kind of entry is a `Registry` in the folder that holds it.
"""

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from flowmask.models.errors import ConfigError


def names(group: str) -> list[str]:
    """Names of all entry points of a group."""
    return sorted({point.name for point in _points(group, tuple(sys.path))})


def load(group: str, name: str) -> Any:
    """The object of an entry point, None if the name does not exist; ConfigError if it cannot be imported."""
    found = [point for point in _points(group, tuple(sys.path)) if point.name == name]
    if not found:
        return None
    said = [f"{point.name} = {point.value} of {point.dist.name if point.dist else '?'}" for point in found]
    if len(found) > 1:
        raise ConfigError(f"several packages have a {group} entry point: {', '.join(said)}; uninstall all but one")
    try:
        return found[0].load()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{group} entry point {said[0]} cannot be imported ({reason}); mend or uninstall it"
        ) from error


@cache
def _points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of the packages on this `sys.path`. Python reads a file of every package for them."""
    return tuple(entry_points(group=group))
