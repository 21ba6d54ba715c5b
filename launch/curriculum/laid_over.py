"""An overlay over all stages of a curriculum or a study: each stage's config is then part of the tree.

So the order for a stage is that of a job: file, the curriculum's own overrides, overlay, command line. A wrong tree is
not changed, because the later validation reports all its faults.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowmask.launch.config import read_tree
from flowmask.launch.jobs import kind_of
from flowmask.launch.overlay import Overlay


def laid_over(tree: Mapping[Any, Any], overlay: Overlay, path: Path) -> dict[Any, Any]:
    """The keys of the curriculum in `path`, with an overlay over each of its stages."""
    found: dict[Any, Any] = overlay.moved({**tree, "stages": with_configs(tree.get("stages"), path)})
    found["launch"] = _merged(found.get("launch"), overlay.keys("launch"))
    for stage in found["stages"] if isinstance(found["stages"], list) else ():
        if isinstance(stage, dict):
            kind, _ = kind_of({"kind": stage.get("kind")}, origin=f"{path}: stage {stage.get('name')}")
            override(stage, overlay, kind.KIND)
    return found


def override(entry: Any, overlay: Overlay, kind: str) -> None:
    """Put an overlay's keys of a kind of job over the `overrides` of an entry."""
    if isinstance(entry, dict):
        entry["overrides"] = _merged(entry.get("overrides"), overlay.keys(kind))


def with_configs(entries: Any, path: Path) -> Any:
    """A list of entries, each changed by `with_config`."""
    return [with_config(entry, path) for entry in entries] if isinstance(entries, list) else entries


def with_config(entry: Any, path: Path, *, key: str = "config") -> Any:
    """An entry with the content of its config file in place of the file's name, which is relative to `path`."""
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        return entry
    return {**entry, key: read_tree(path.parent / entry[key])}


def _merged(section: Any, keys: Mapping[str, Any]) -> Any:
    return section if not isinstance(section, dict | None) else {**(section or {}), **keys}
