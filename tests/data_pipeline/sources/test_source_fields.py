"""One law for every source: whatever one field of its annotations becomes, it is read or refused by file and field."""

import copy
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from film import write_film
from layouts import COCO_JSON, INSTANCES, PICKLE, write_davis, write_refcoco, write_youtube

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import VideoSet
from flowmask.models.errors import DataError

# What a field may turn into; each is wrong for most of them.
VALUES = [None, True, -1, 10**30, 1.5, float("nan"), float("inf"), "", " ", "x", "../x", "a\nb", "\0", "\ud800",
          [], [None], [[]], [[1, 2]], {}, {"": None}, {"size": "x"}, {"size": [1, 1], "counts": "0"}]  # fmt: skip
HOW = ("removed", "renamed", "retyped", "retyped")
SAID = re.compile(r"\d+|[A-Za-z_]+")


@dataclass(frozen=True)
class Layout:
    """A dataset, and the annotation files of it that a person may have got wrong."""

    root: Path
    source: str
    split: str
    files: tuple[str, ...]
    lines: bool = False

    def open(self, root: Path) -> VideoSet:
        return open_source(DataSourceConfig(source=self.source, root=root, split=self.split))


def write_videos(root: Path) -> None:
    root.mkdir()
    write_film(root / "film.mp4", frames=3)
    masks = [rle.encode(np.eye(48, 64, dtype=bool)), None, rle.encode(np.ones((48, 64), bool))]
    expressions = [{"exp_id": "7", "text": "the clock", "masks": masks}, {"text": "all", "masks": masks[::-1]}]
    (root / "train.jsonl").write_text(json.dumps({"video": "film.mp4", "video_id": "v", "expressions": expressions}))


@pytest.fixture(scope="module")
def layouts(mevis, tmp_path_factory) -> dict[str, Layout]:
    base = tmp_path_factory.mktemp("layouts")
    write_youtube(base / "youtube")
    write_davis(base / "davis")
    (base / "coco").mkdir()
    write_refcoco(base / "coco")
    write_videos(base / "film")
    meta = "meta_expressions/{}/meta_expressions.json"
    return {
        "mevis": Layout(mevis, "mevis", "train", ("train/meta_expressions.json", "train/mask_dict.json")),
        "youtube": Layout(base / "youtube", "ref_youtube_vos", "train", (meta.format("train"), "train/meta.json")),
        "held back": Layout(base / "youtube", "ref_youtube_vos", "valid", (meta.format("valid"), meta.format("test"))),
        "davis": Layout(base / "davis", "ref_davis17", "valid", (meta.format("valid"),)),
        "coco": Layout(base / "coco", "refcoco", "refcoco/train", (COCO_JSON,)),
        "pickle": Layout(base / "coco", "refcoco", "refcoco/unc/train", (PICKLE, INSTANCES)),
        "videos": Layout(base / "film", "videos", "train", ("train.jsonl",), lines=True),
    }


NAMES = ("mevis", "youtube", "held back", "davis", "coco", "pickle", "videos")


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in parsed annotations, the whole left out."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = []
    for key, value in items:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def spoil(content: Any, path: tuple[Any, ...], value: Any, *, how: str) -> Any:
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if how == "removed":
        del parent[path[-1]]
    elif how == "renamed" and isinstance(parent, dict):
        parent[str(value)] = parent.pop(path[-1])
    else:
        parent[path[-1]] = value
    return content


def read_all(source: VideoSet) -> None:
    """What a cache build asks of a source."""
    source.identity()
    for video in source.videos():
        str(video)
        if not video.expressions:
            continue
        video.files_digest()
        ids = sorted({0, len(video.frame_names) - 1})
        height, width = video.size
        assert [frame.shape for frame in video.frames(ids)] == [(height, width, 3)] * len(ids)
        for expression in video.expressions:
            assert expression.exp_id.isprintable() and expression.text.encode().strip()
            if video.has_masks:
                assert video.mask(expression.anno_ids, ids).shape == (len(ids), height, width)


def check(layout: Layout, root: Path, change: Callable[[], tuple[str, tuple[Any, ...], Any, str]]) -> bool:
    """Spoil one field in the copy `root`, read everything, mend it; whether it was refused."""
    name, path, value, how = change()
    file = root / name
    before = file.read_bytes()
    codec: Any = pickle if name.endswith(".p") else json
    try:
        content = codec.dumps(spoil(codec.loads(before), path, value, how=how))
    except UnicodeEncodeError:
        return False
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    what = f"{name}: {path} {how} {value!r}"
    try:
        read_all(layout.open(root))
    except DataError as error:
        said = str(error)
        assert "\n" not in said, what
        assert str(root) in said, f"{what}: no file in {said!r}"
        keys = {str(key) for key in path} | {str(value)}
        words = set(SAID.findall(said))
        near = any(key in said or key.removesuffix("s") in said or key in words for key in keys)
        assert near or "empty" in said or "frame" in said or "mask" in said, f"{what}: no field in {said!r}"
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        file.write_bytes(before)
    return False


def trial(layout: Layout, root: Path, draw: random.Random) -> bool:
    def change() -> tuple[str, tuple[Any, ...], Any, str]:
        name = draw.choice(layout.files)
        codec: Any = pickle if name.endswith(".p") else json
        paths = places(codec.loads((root / name).read_bytes()))
        return name, draw.choice(paths), draw.choice(VALUES), draw.choice(HOW)

    return check(layout, root, change)


def trials(layouts, name, tmp_path, *, count, seed):
    layout, draw = layouts[name], random.Random(f"{seed} {name}")
    root = shutil.copytree(layout.root, tmp_path / "data")
    read_all(layout.open(root))
    refused = sum(trial(layout, root, draw) for _ in range(count))
    assert refused > count // 10, "most fields matter"


@pytest.mark.parametrize("name", NAMES)
def test_any_one_field_spoiled_is_read_or_refused_by_file_and_field(layouts, name, tmp_path):
    trials(layouts, name, tmp_path, count=60, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_any_one_field_spoiled_is_read_or_refused_at_length(layouts, name, tmp_path):
    seed = int(os.environ.get("SEED", "1"))
    trials(layouts, name, tmp_path, count=50 * int(os.environ.get("TRIALS", "10")), seed=seed)
