"""An overlay over all stages of a curriculum or a study: what a stage names by its file stands in the tree then.

So one order holds for a stage as for a job: file, the curriculum's own overrides, overlay, command line. A tree that
is not as it should be stays so: whoever validates it says all that is wrong.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowmask.launch.config import read_tree
from flowmask.launch.jobs import kind_of
from flowmask.launch.overlay import Overlay


def laid_over(tree: Mapping[Any, Any], overlay: Overlay, path: Path) -> dict[Any, Any]:
    """The keys of a curriculum, which stands in `path`, with an overlay over each of its stages."""
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
    """A list of entries, each as `with_config` gives it."""
    return [with_config(entry, path) for entry in entries] if isinstance(entries, list) else entries


def with_config(entry: Any, path: Path, *, key: str = "config") -> Any:
    """An entry with the config whose file it names, from the folder of `path`, in the place of its name."""
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        return entry
    return {**entry, key: read_tree(path.parent / entry[key])}


def _merged(section: Any, keys: Mapping[str, Any]) -> Any:
    return section if not isinstance(section, dict | None) else {**(section or {}), **keys}
