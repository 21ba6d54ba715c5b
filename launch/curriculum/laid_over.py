"""An overlay over all stages of a curriculum or a study: what a stage names by its file stands in the tree then.

So one order holds for a stage as for a job: file, the curriculum's own overrides, overlay, command line.
"""

from pathlib import Path
from typing import Any

from flowmask.launch.config import read_tree
from flowmask.launch.jobs import kind_of
from flowmask.launch.overlay import Overlay


def laid_over(tree: dict[Any, Any], overlay: Overlay, path: Path) -> dict[Any, Any]:
    """The keys of a curriculum, which stands in `path`, with an overlay over each of its stages."""
    named = {**tree, "stages": [with_config(stage, "config", path) for stage in _list(tree, "stages")]}
    found: dict[Any, Any] = overlay.moved(named)
    found["launch"] = {**(found.get("launch") or {}), **overlay.keys("launch")}
    for stage in found["stages"]:
        if isinstance(stage, dict):
            kind, _ = kind_of({"kind": stage.get("kind")}, origin=f"{path}: stage {stage.get('name')}")
            override(stage, overlay, kind.KIND)
    return found


def override(entry: dict[Any, Any], overlay: Overlay, kind: str) -> None:
    """Put an overlay's keys of a kind of job over the `overrides` of an entry."""
    entry["overrides"] = {**(entry.get("overrides") or {}), **overlay.keys(kind)}


def with_config(entry: Any, key: str, path: Path) -> Any:
    """An entry with the config whose file it names, from the folder of `path`, in the place of its name."""
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        return entry
    return {**entry, key: read_tree(path.parent / entry[key])}


def _list(tree: dict[Any, Any], key: str) -> list[Any]:
    """A list of the tree; what is none stays to be refused with everything else."""
    return tree[key] if isinstance(tree.get(key), list) else []
