"""The data of a demo: a synthetic dataset with three splits, and a tiny Wan. Existing parts are kept."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flowmask.launch.progress import bar
from flowmask.models.errors import ConfigError
from flowmask.models.files import move_new, read_object, write_atomically
from flowmask.models.folders.scratch import clear, scratch

SPLITS = {"train": "train_videos", "calibrate": "calibrate_videos", "valid_u": "valid_videos"}


def claim(mark: Path, settings: Mapping[str, Any], *, what: str) -> None:
    """Bind the folder of `mark` to these settings. Raises ConfigError if it has others."""
    if not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(mark, json.dumps(settings))
    held, wanted = read_object(mark), json.loads(json.dumps(settings))
    if held != wanted:
        changed = sorted(key for key in held | wanted if held.get(key) != wanted.get(key))
        where = f"{mark.parent} holds {what} with other settings ({', '.join(changed)})"
        raise ConfigError(f"{where}; name another folder")


def write_dataset(root: Path, sizes: Mapping[str, Any]) -> None:
    """Write the splits below `root`; sizes: as in configs/demo.yaml."""
    for split, key in SPLITS.items():
        if videos := sizes.get(key, 0):
            write_once(root / split, partial(_write_split, sizes=sizes, split=split, videos=videos))


def _write_split(root: Path, *, sizes: Mapping[str, Any], split: str, videos: int) -> None:
    from flowmask.data_pipeline.sources.synthetic import write_synthetic

    with bar() as update:
        write_synthetic(
            root,
            split=split,
            videos=videos,
            seed=sizes["seed"],
            frames=sizes["frames"],
            size=sizes["size_px"],
            no_target=sizes["no_target"][split],
            on_progress=lambda done: update(split, done, videos),
        )


def write_wan(place: Path, *, seed: int) -> None:
    """Write a tiny Wan2.1 folder: all weights except the VAE's are random."""
    from flowmask.models.weights.tiny_wan import write_tiny_wan

    write_once(place, lambda root: write_tiny_wan(root / place.name, seed=seed))


def write_once(place: Path, write: Callable[[Path], None]) -> None:
    """Unless `place` exists, `write(root)` makes a folder of its name in a scratch, which is moved there when complete.

    In both cases nothing stays of processes that were killed in this.
    """
    if place.exists():
        clear(place.parent, undo=False)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with scratch(place.parent) as root:
        write(root)
        move_new(root / place.name, place)
