"""Laws of Long-RVOS: a folder of masks for each object, and one line for each mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import SIZE, index_map, write_long_rvos
from PIL import Image

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.config import CacheSourceConfig, DataSourceConfig
from flowmask.data_pipeline.plan.leaks import family_of
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Video, VideoSet, names_nothing
from flowmask.data_pipeline.sources.long_rvos import LongRvosSource
from flowmask.models.errors import DataError

META = "valid/meta_expressions.json"
MASKS = "valid/Annotations/1b"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def long_rvos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("long_rvos")
    write_long_rvos(root)
    return root


@pytest.fixture
def copy(long_rvos: Path, tmp_path: Path) -> Path:
    return shutil.copytree(long_rvos, tmp_path / "data")


def open_split(root: Path, split: str = "valid") -> VideoSet:
    return open_source(DataSourceConfig(source="long_rvos", root=root, split=split))


def only(root: Path, split: str = "valid") -> Video:
    (video,) = open_split(root, split).videos()
    return video


def edit(name: str, change: Callable[[Any], object]) -> Spoil:
    def spoil(root: Path) -> None:
        content = json.loads((root / name).read_text())
        change(content)
        (root / name).write_text(json.dumps(content))

    return spoil


def expression(change: Callable[[Any], object], split: str = "valid") -> Spoil:
    name = f"{split}/meta_expressions.json"
    return edit(name, lambda meta: [change(video["expressions"]["1"]) for video in meta["videos"].values()])


def test_frames_sentences_kinds_and_masks_are_those_on_disk(long_rvos: Path) -> None:
    video = only(long_rvos)
    assert (video.video_id, video.size, len(video.frame_names), video.has_masks) == ("1b", SIZE, 6, True)
    assert [e.anno_ids for e in video.expressions] == [("1",), ("3",), ("1",)]
    assert [e.kind for e in video.expressions] == ["static", "dynamic", "static+dynamic"]
    truth = np.stack([index_map(i) for i in range(6)])
    for objects in ([1], [3], [1, 3], []):
        mask = video.mask([str(o) for o in objects], [5, 0, 2, 0])
        assert np.array_equal(mask, np.isin(truth[[5, 0, 2, 0]], objects))
    video.check_masks()


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB"])
def test_any_value_above_0_of_a_picture_is_the_object(copy: Path, mode: str) -> None:
    before = only(copy).mask(["3"], range(6))
    for path in (copy / MASKS / "3").iterdir():
        shown = np.asarray(Image.open(path)) > 0
        grey = Image.fromarray(shown.astype(np.uint8) * np.uint8(1 if mode == "P" else 255))
        if mode == "P":
            grey.putpalette([0, 0, 0, 255, 0, 0])
        (grey if mode == "P" else grey.convert(mode)).save(path)
    assert np.array_equal(only(copy).mask(["3"], range(6)), before) and before.any()


def test_splits_are_folders_and_those_without_public_masks_are_predicted_alone(long_rvos: Path) -> None:
    assert LongRvosSource.evaluation_splits(long_rvos, split="train") == ["test", "valid"]
    assert LongRvosSource.split_ids(long_rvos, "test") == {"2c"}
    assert family_of(DataSourceConfig(source="long_rvos", root=long_rvos)) == "long_rvos"
    video = only(long_rvos, "test")
    assert not video.has_masks and all(e.anno_ids == () for e in video.expressions)
    assert open_split(long_rvos, "test").identity().keys() == {"expressions"}


def test_what_is_read_changes_the_identity_and_nothing_else_does(copy: Path) -> None:
    before = open_split(copy).identity()
    (copy / "valid/frame_types.json").write_text("{}")
    assert open_split(copy).identity() == before and before.keys() == {"expressions", "masks"}
    for spoil in (
        lambda: (copy / MASKS / "3/00005.png").unlink(),
        lambda: (copy / MASKS / "1/00000.png").write_bytes(b"other"),
        lambda: shutil.move(copy / MASKS / "3/00000.png", copy / MASKS / "1/00099.png"),
    ):
        spoil()
        after = open_split(copy).identity()
        assert after["masks"] != before["masks"] and after["expressions"] == before["expressions"]
        before = after


@pytest.mark.parametrize("obj_id", [[], None])
def test_a_sentence_without_an_object_names_nothing(copy: Path, obj_id: Any) -> None:
    expression(lambda entry: entry.update(obj_id=obj_id))(copy)
    video = only(copy)
    assert [e.exp_id for e in video.expressions if names_nothing(video, e)] == ["1"]
    assert not video.mask((), [0]).any()
    video.check_masks()


def test_a_list_that_is_not_scored_needs_no_kinds(copy: Path) -> None:
    for split in ("train", "valid", "test"):
        expression(lambda entry: entry.pop("type"), split)(copy)
    for split in ("train", "test"):
        assert [e.kind for e in only(copy, split).expressions] == ["static", "", "static+dynamic"]
    with pytest.raises(DataError, match=r"1b\.expressions\.1 has no field 'type'"):
        open_split(copy)


def blacken(folder: Path) -> None:
    for path in folder.iterdir():
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: shutil.rmtree(root / MASKS / "3"),
        lambda root: blacken(root / MASKS / "3"),
        lambda root: [path.rename(path.with_stem(f"x{path.stem}")) for path in (root / MASKS / "3").iterdir()],
        expression(lambda entry: entry.update(obj_id=7)),
    ],
)
def test_an_object_that_no_picture_shows_is_refused_with_the_folders_there(copy: Path, spoil: Spoil) -> None:
    spoil(copy)
    video = only(copy)
    said = r"video 1b: expression 1 names object [37], which no picture .*1b/[37] shows; the folders there are 1"
    with pytest.raises(DataError, match=said) as raised:
        video.check_masks()
    assert "\n" not in str(raised.value)


SPOILED: list[tuple[Spoil, str]] = [
    (lambda root: shutil.rmtree(root / "valid"), "valid: no such dataset folder .* holds test, train"),
    (lambda root: shutil.rmtree(root / "valid/JPEGImages"), r"JPEGImages is missing; a split of Long-RVOS holds"),
    (lambda root: (root / META).unlink(), r"meta_expressions\.json is missing"),
    (lambda root: (root / META).write_text('{"videos": {}}'), "the dataset is empty"),
    (edit(META, lambda meta: meta["videos"]["1b"].update(frames=[])), r"videos\.1b\.frames is empty"),
    (expression(lambda entry: entry.pop("exp")), r"1b\.expressions\.1 has no field 'exp'"),
    (expression(lambda entry: entry.pop("obj_id")), r"expressions\.1 has no field 'obj_id'"),
    *[
        (expression(lambda entry, value=value: entry.update(obj_id=value)), r"expressions\.1\.obj_id is .*; expected")
        for value in ("", True, 1.5, ["1"], {}, "..", "a/b", "/etc")
    ],
    *[
        (expression(lambda entry, value=value: entry.update(type=value)), r"1\.type is .*; expected one of static, dyn")
        for value in ("", "hybrid", "Static", None, 0, ["static"])
    ],
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), SPOILED)
def test_a_spoiled_dataset_is_refused_in_one_line(copy: Path, spoil: Spoil, said: str) -> None:
    spoil(copy)
    with pytest.raises(DataError, match=said) as raised:
        open_split(copy)
    assert "\n" not in str(raised.value) and str(copy) in str(raised.value)


def test_train_without_masks_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "train/Annotations")
    with pytest.raises(DataError, match="train/Annotations is missing; it holds the masks of the split train"):
        open_split(copy, "train")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"no image"), "not a readable mask"),
        (lambda path: Image.new("L", (10, 12)).save(path), "the mask is 12x10 .*its frame 48x64"),
    ],
)
def test_a_bad_picture_of_an_object_is_refused_with_its_path(copy: Path, spoil: Spoil, said: str) -> None:
    spoil(copy / MASKS / "1/00010.png")
    with pytest.raises(DataError, match=rf"1b/1/00010\.png: .*({said})") as raised:
        only(copy).mask(("1",), [1, 2])
    assert "\n" not in str(raised.value)


def test_a_cache_of_it_is_whole(long_rvos: Path, make_config: Any, tmp_path: Path) -> None:
    data = CacheSourceConfig(source="long_rvos", root=long_rvos)
    config = make_config(tmp_path / "cache", cache={"views": 1}).model_copy(update={"data": data})
    build(config)
    report = verify(config.out)
    assert report.ok and report.records == 2  # 6 frames are two clips of 5
