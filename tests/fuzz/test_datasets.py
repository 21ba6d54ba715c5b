"""Mutants of small datasets in every layout: each opens with the maker's values, or is refused with file and field."""

import copy
import json
import pickle
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from film import write_film
from layouts import (
    COCO_JSON,
    INSTANCES,
    PICKLE,
    write_davis,
    write_grefs,
    write_long_rvos,
    write_mevis,
    write_refcoco,
    write_revos,
    write_youtube,
)
from sparse_layouts import write_a2d, write_jhmdb
from trials import SEED, TRIALS

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import VideoSet
from flowmask.models.errors import DataError

ELSEWHERE = "/etc/passwd"  # a list of videos may name files of other folders
# Values that replace a field; each is wrong for most fields.
VALUES = [None, True, -1, 10**30, 1.5, float("nan"), float("inf"), "", " ", "x", "../x", "a\nb", "\0", "\ud800",
          [], [None], [[]], [[1, 2]], {}, {"": None}, {"size": "x"}, {"size": [1, 1], "counts": "0"},
          2**62, 10**4000, 1e308, "x" * 5000, "x" * 300,
          "a/b", "..", ELSEWHERE, "CON", "&nbsp;", "\u200b", "it\u2028",
          {"size": [48, 64], "counts": [2**62, 2**62, 2**62, 2**62 + 48 * 64]},
          {"size": [48, 64], "counts": "o" * 11 + "1"}, {"size": [48, 64], "counts": "0" * 3000},
          [[0, 0, 190, 140] * 2000], [[0, 0, 1e300, 5, 5, 5]], [0] * 3000]  # fmt: skip
HOW = ("removed", "renamed", "retyped", "retyped")
MARK = "what json cannot say"
IN_TEXT = {
    "doubled": "0",
    "buried": "[" * 3000 + "]" * 3000,
    "deep": "[" * 900 + "]" * 900,
    "long": "9" * 5000,
    "unread": "1e999",
}
LIMIT_S = 2.0  # of CPU, to read or refuse one damaged file
SAID = re.compile(r"\d+|[A-Za-z_]+")


@dataclass(frozen=True)
class Layout:
    """A dataset, and its annotation files, which a person can get wrong."""

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
def layouts(tmp_path_factory) -> dict[str, Layout]:
    base = tmp_path_factory.mktemp("layouts")
    write_mevis(base / "mevis/train")
    write_youtube(base / "youtube")
    write_davis(base / "davis")
    (base / "coco").mkdir()
    write_refcoco(base / "coco")
    write_grefs(base / "coco")
    write_revos(base / "revos")
    write_long_rvos(base / "long_rvos")
    write_videos(base / "film")
    write_jhmdb(base / "jhmdb")
    if HAS_H5PY:
        write_a2d(base / "a2d")
    meta = "meta_expressions/{}/meta_expressions.json"
    return {
        "mevis": Layout(base / "mevis", "mevis", "train", ("train/meta_expressions.json", "train/mask_dict.json")),
        "youtube": Layout(base / "youtube", "ref_youtube_vos", "train", (meta.format("train"), "train/meta.json")),
        "held back": Layout(base / "youtube", "ref_youtube_vos", "valid", (meta.format("valid"), meta.format("test"))),
        "davis": Layout(base / "davis", "ref_davis17", "valid", (meta.format("valid"),)),
        "coco": Layout(base / "coco", "refcoco", "refcoco/train", (COCO_JSON,)),
        "pickle": Layout(base / "coco", "refcoco", "refcoco/unc/train", (PICKLE, INSTANCES)),
        "grefs": Layout(base / "coco", "refcoco", "grefcoco/unc/train", ("grefcoco/grefs(unc).json",)),
        "revos": Layout(base / "revos", "revos", "valid", ("meta_expressions_valid_.json", "mask_dict.json")),
        "long_rvos": Layout(base / "long_rvos", "long_rvos", "valid", ("valid/meta_expressions.json",)),
        "jhmdb": Layout(base / "jhmdb", "jhmdb_sentences", "test", ("jhmdb_sentences_samples_metadata.json",)),
        "a2d": Layout(base / "a2d", "a2d_sentences", "train", ("a2d_sentences_single_frame_train_annotations.json",)),
        "videos": Layout(base / "film", "videos", "train", ("train.jsonl",), lines=True),
    }


HAS_H5PY = find_spec("h5py") is not None
NAMES = ["mevis", "youtube", "held back", "davis", "coco", "pickle", "grefs", "revos", "long_rvos", "videos", "jhmdb"]
NAMES += ["a2d"] * HAS_H5PY


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in parsed annotations, except the root."""
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
    """Read from a source all that a cache build reads."""
    source.identity()
    for video in source.videos():
        str(video)
        if not video.expressions:
            continue
        video.files_digest()
        video.check_masks()
        ids = sorted({0, len(video.frame_names) - 1})
        height, width = video.size
        assert [frame.shape for frame in video.frames(ids)] == [(height, width, 3)] * len(ids)
        for expression in video.expressions:
            assert expression.exp_id.isprintable() and expression.text.encode().strip()
            known = video.annotated(expression.anno_ids)
            assert known is None or {*known} <= {*range(len(video.frame_names))} != set()
            if video.has_masks:
                assert video.mask(expression.anno_ids, ids).shape == (len(ids), height, width)


def mutant(name: str, before: bytes, draw: random.Random) -> tuple[str, set[str], bytes]:
    """(the change of an annotation file, words of which its refusal must contain one, the new bytes)."""
    codec: Any = pickle if name.endswith(".p") else json
    content = codec.loads(before)
    path, value = draw.choice(places(content)), draw.choice(VALUES)
    how = draw.choice(HOW if codec is pickle else (*HOW, *IN_TEXT))
    if how == "doubled" and all(isinstance(key, int) for key in path):
        how = "removed"  # a list has no key
    words = {str(key) for key in path} | {str(value)}
    if how not in IN_TEXT:
        changed = codec.dumps(spoil(content, path, value, how=how))
        return f"{name}: {path} {how} {value!r}", words, changed if isinstance(changed, bytes) else changed.encode()
    if how == "doubled":
        while isinstance(path[-1], int):
            path = path[:-1]
        said = json.dumps(spoil(content, (*path[:-1], MARK), 0, how="retyped"))
        said = said.replace(json.dumps(MARK), json.dumps(path[-1]))
    else:
        said = json.dumps(spoil(content, path, MARK, how="retyped")).replace(json.dumps(MARK), IN_TEXT[how])
    return f"{name}: {path} {how}", {*words, "JSON"}, said.encode()


def refused(layout: Layout, root: Path, draw: random.Random) -> bool:
    """Change one annotation file in the copy `root`, read all, restore the file; whether it was refused."""
    name = draw.choice(layout.files)
    file = root / name
    before = file.read_bytes()
    try:
        what, keys, content = mutant(name, before, draw)
    except UnicodeEncodeError:
        return False
    file.write_bytes(content)
    began = time.process_time()
    try:
        read_all(layout.open(root))
    except DataError as error:
        said = str(error)
        assert "\n" not in said, what
        assert str(root) in said or said.startswith(f"{ELSEWHERE}: "), f"{what}: no file in {said!r}"
        words = set(SAID.findall(said))
        near = any(key in said or key.removesuffix("s") in said or key in words for key in keys)
        assert near or "empty" in said or "frame" in said or "mask" in said, f"{what}: no field in {said!r}"
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        file.write_bytes(before)
        assert time.process_time() - began < LIMIT_S, what
    assert "doubled" not in what, f"{what}: one of the two was dropped without a word"
    return False


def trials(layouts, name, tmp_path, *, count, seed):
    layout, draw = layouts[name], random.Random(f"{seed} {name}")
    root = shutil.copytree(layout.root, tmp_path / "data")
    read_all(layout.open(root))
    assert sum(refused(layout, root, draw) for _ in range(count)) > count // 10, "most fields matter"


@pytest.mark.parametrize("name", NAMES)
def test_any_one_field_spoiled_is_read_or_refused_by_file_and_field(layouts, name, tmp_path):
    trials(layouts, name, tmp_path, count=100, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_any_one_field_spoiled_is_read_or_refused_at_length(layouts, name, tmp_path):
    seed = 1 + SEED
    trials(layouts, name, tmp_path, count=500 * TRIALS, seed=seed)


def meaning(source: VideoSet) -> dict[str, Any]:
    """All content of a source, by the ids of its videos."""
    said = {}
    for video in source.videos():
        ids = range(len(video.frame_names))
        masks = [video.mask(e.anno_ids, ids).tobytes() if video.has_masks else None for e in video.expressions]
        sentences = {e.exp_id: (e.text, e.kind, mask) for e, mask in zip(video.expressions, masks)}
        said[video.video_id] = (video.frame_names, sentences, video.size)
    return said


def turned_around(content: Any) -> Any:
    """The same objects with their members in reverse order; lists stay."""
    if isinstance(content, dict):
        return {key: turned_around(content[key]) for key in reversed(content)}
    return [turned_around(item) for item in content] if isinstance(content, list) else content


SPELLED: dict[str, Callable[[Any], bytes]] = {
    "with a byte order mark": lambda content: b"\xef\xbb\xbf" + json.dumps(content).encode(),
    "in plain letters": lambda content: json.dumps(content, ensure_ascii=False).encode(),
    "without spaces": lambda content: json.dumps(content, separators=(",", ":")).encode(),
    "turned around": lambda content: json.dumps(turned_around(content)).encode(),
    "in lines": lambda content: json.dumps(content, indent=3).replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("how", SPELLED)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "pickle"])
def test_another_spelling_of_the_same_annotations_means_the_same(layouts, name, how, tmp_path):
    layout = layouts[name]
    root = shutil.copytree(layout.root, tmp_path / "data")
    before = meaning(layout.open(root))
    for file in layout.files:
        content = SPELLED[how](json.loads((root / file).read_bytes()))
        (root / file).write_bytes(content.replace(b"\r\n", b"\r") if layout.lines else content)
    assert meaning(layout.open(root)) == before
