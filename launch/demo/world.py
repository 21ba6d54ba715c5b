"""The data of a demo: a synthetic dataset with three splits, and a tiny Wan. Existing parts are kept."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmask.launch.progress import bar
from flowmask.models.errors import ConfigError
from flowmask.models.files import move_new, read_object, write_atomically
from flowmask.models.folders.scratch import scratch

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
    from flowmask.data_pipeline.sources.synthetic import write_synthetic

    for split, key in SPLITS.items():
        videos, place = sizes.get(key, 0), root / split
        if place.exists() or not videos:
            continue
        with whole(place) as made, bar() as update:
            write_synthetic(
                made,
                split=split,
                videos=videos,
                seed=sizes["seed"],
                frames=sizes["frames"],
                size=sizes["size_px"],
                no_target=sizes["no_target"][split],
                on_progress=lambda done, videos=videos, split=split: update(split, done, videos),  # type: ignore[misc]
            )


def write_wan(place: Path, *, seed: int) -> None:
    """Write a tiny Wan2.1 folder: all weights except the VAE's are random."""
    from flowmask.models.weights.tiny_wan import write_tiny_wan

    if not place.exists():
        with whole(place) as root:
            write_tiny_wan(root / place.name, seed=seed)


@contextmanager
def whole(place: Path) -> Iterator[Path]:
    """A scratch root for a folder called `place.name`, which is moved to `place` once it is complete."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with scratch(place.parent) as root:
        yield root
        move_new(root / place.name, place)
