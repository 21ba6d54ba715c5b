"""Laws of the layout of Ref-YouTube-VOS and Ref-DAVIS17: palette masks, and one line for each mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from layouts import SIZE, index_map, write_davis, write_youtube
from PIL import Image

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.config import CacheSourceConfig, DataSourceConfig
from flowmask.data_pipeline.sources import open_source
from flowmask.models.errors import DataError


@pytest.fixture(scope="module")
def youtube(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ref_youtube_vos")
    write_youtube(root)
    return root


@pytest.fixture
def copy(youtube, tmp_path) -> Path:
    return shutil.copytree(youtube, tmp_path / "data")


def open_split(root, split="train", *, source="ref_youtube_vos"):
    return open_source(DataSourceConfig(source=source, root=root, split=split))


def test_frames_sentences_and_masks_are_those_on_disk(youtube):
    first, second = open_split(youtube).videos()
    assert (first.video_id, first.size, first.frame_names[1]) == ("0a1b", SIZE, "00005")
    assert len(second.frame_names) == 4 and first.has_masks
    assert [e.anno_ids for e in first.expressions] == [("1",), ("3",), ("1",)]
    assert first.expressions[0].text == "A red  Square"
    path = youtube / "train/JPEGImages/0a1b/00010.jpg"
    assert np.array_equal(first.frames([2])[0], np.asarray(Image.open(path).convert("RGB")))


def test_a_mask_is_where_the_palette_index_is_the_object(youtube):
    video = open_split(youtube).videos()[0]
    truth = np.stack([index_map(i) for i in range(6)])
    for objects in ((1,), (3,), (1, 3)):
        ids = [5, 0, 2, 0]
        mask = video.mask([str(o) for o in objects], ids)
        assert mask.dtype == bool and np.array_equal(mask, np.isin(truth[ids], objects))


def test_valid_has_no_masks_and_none_of_the_test_videos(youtube):
    (video,) = open_split(youtube, "valid").videos()
    assert video.video_id == "4e5f" and not video.has_masks and video.expressions[0].anno_ids == ()


def test_first_frame_masks_of_another_challenge_do_not_make_valid_a_split_with_masks(copy):
    (copy / "valid/Annotations/4e5f").mkdir(parents=True)
    assert not open_split(copy, "valid").videos()[0].has_masks


def test_what_is_read_changes_the_identity_and_nothing_else_does(copy):
    before = open_split(copy).identity()
    assert open_split(copy).identity() == before and before.keys() == {"expressions", "masks"}
    mask = copy / "train/Annotations/2c3d/00005.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 3, SIZE).astype(np.uint8)).save(mask)
    after = open_split(copy).identity()
    assert after["masks"] != before["masks"] and after["expressions"] == before["expressions"]
    edit("meta_expressions/train/meta_expressions.json", lambda m: m["videos"].pop("0a1b"))(copy)
    assert open_split(copy).identity()["expressions"] != before["expressions"]


def edit(name, change):
    """A change to the parsed JSON of a file of the dataset."""

    def spoil(root):
        content = json.loads((root / name).read_text())
        change(content)
        (root / name).write_text(json.dumps(content))

    return spoil


META, OBJECTS = "meta_expressions/train/meta_expressions.json", "train/meta.json"


def expression(change):
    return edit(META, lambda meta: change(meta["videos"]["2c3d"]["expressions"]["1"]))


def obj_id(value):
    return expression(lambda entry: entry.update(obj_id=value))


SPOILED = [
    (lambda root: shutil.rmtree(root), "train/JPEGImages: no such folder of frames"),
    (lambda root: shutil.rmtree(root / "train/Annotations"), "train/Annotations is missing"),
    (lambda root: (root / META).unlink(), "train/meta_expressions.json is missing"),
    (lambda root: (root / META).write_text("{"), "meta_expressions.json: no valid JSON"),
    (lambda root: (root / META).write_text("[]"), "meta_expressions.json has no field 'videos'"),
    (lambda root: (root / META).write_text('{"videos": {}}'), "the dataset is empty"),
    (lambda root: (root / OBJECTS).write_text("7"), "meta.json has no field 'videos'"),
    (edit(OBJECTS, lambda m: m["videos"].pop("2c3d")), "meta.json: videos has no field '2c3d'"),
    (edit(OBJECTS, lambda m: m["videos"]["2c3d"].pop("objects")), "2c3d has no field 'objects'"),
    (edit(OBJECTS, lambda m: m["videos"]["2c3d"]["objects"].pop("3")), r"1\.obj_id names 3, which .*meta\.json"),
    (edit(META, lambda m: m["videos"]["2c3d"].pop("frames")), r"videos\.2c3d has no field 'frames'"),
    (edit(META, lambda m: m["videos"]["2c3d"].update(frames=[])), r"2c3d\.frames is empty"),
    (edit(META, lambda m: m["videos"]["2c3d"].pop("expressions")), "2c3d has no field 'expressions'"),
    (expression(lambda entry: entry.pop("exp")), r"2c3d\.expressions\.1 has no field 'exp'"),
    (expression(lambda entry: entry.update(exp=" ")), "an empty sentence"),
    (expression(lambda entry: entry.pop("obj_id")), r"expressions\.1 has no field 'obj_id'"),
    *[(obj_id(value), r"1\.obj_id is .*expected one palette index") for value in ("0", 256, -1, "1x", ["1"], True)],
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), SPOILED)
def test_a_spoiled_dataset_is_refused_in_one_line(copy, spoil, said):
    spoil(copy)
    with pytest.raises(DataError, match=said) as raised:
        open_split(copy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "the mask is missing"),
        (lambda path: path.write_bytes(b"no image"), "not a readable mask"),
        (lambda path: path.write_bytes(path.read_bytes()[:80]), "not a readable mask|truncated"),
        (lambda path: Image.new("P", (10, 12)).save(path), "the mask is 12x10 .*its frame 48x64"),
        (lambda path: Image.new("RGB", SIZE[::-1]).save(path), "a mask of mode RGB"),
    ],
)
def test_a_bad_mask_is_refused_with_its_path(copy, spoil, said):
    spoil(copy / "train/Annotations/0a1b/00010.png")
    with pytest.raises(DataError, match=rf"00010\.png: .*({said})") as raised:
        open_split(copy).videos()[0].mask(("1",), [1, 2])
    assert "\n" not in str(raised.value)


def test_a_missing_frame_or_mask_changes_what_the_source_is_and_is_refused_when_it_is_read(copy):
    whole, digest = open_split(copy).identity(), open_split(copy).videos()[1].files_digest()
    (copy / "train/Annotations/2c3d/00005.png").unlink()
    (copy / "train/JPEGImages/2c3d/00005.jpg").unlink()
    source = open_split(copy)
    video = source.videos()[1]
    assert source.identity()["masks"] != whole["masks"]
    assert video.files_digest() != digest
    assert video.missing_file([0, 1]) == copy / "train/JPEGImages/2c3d/00005.jpg"
    with pytest.raises(DataError, match=r"00005\.png: the mask is missing"):
        video.mask(("1",), [1])


def test_a_cache_of_it_is_whole(youtube, make_config, tmp_path):
    data = CacheSourceConfig(source="ref_youtube_vos", root=youtube)
    config = make_config(tmp_path / "cache", cache={"views": 1}).model_copy(update={"data": data})
    build(config)
    report = verify(config.out)
    assert report.ok and report.records == 3  # 6 frames are two clips of 5, 4 frames one
    assert 6 <= report.examples <= 9  # without the object that left


DAVIS = "meta_expressions/valid/meta_expressions.json"


@pytest.fixture
def davis(tmp_path) -> Path:
    root = tmp_path / "ref_davis17"
    write_davis(root)
    return root


def test_an_expression_of_davis_is_object_times_four_plus_annotator(davis):
    (video,) = open_split(davis, "valid", source="ref_davis17").videos()
    assert video.has_masks and [e.exp_id for e in video.expressions] == [str(i) for i in range(8)]
    for expression in video.expressions:
        place, annotator = divmod(int(expression.exp_id), 4)
        assert expression.anno_ids == (("1", "3")[place],)
        assert expression.text.endswith(f"words of {annotator}")
    truth = [index_map(i) == 3 for i in range(3)]
    assert np.array_equal(video.mask(("3",), range(3)), truth)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.pop("7"), r"blackswan\.expressions has the ids 0, 1, .*in fours"),
        (lambda e: e.update({"8": e.pop("7")}), r"expressions has the ids .*in fours"),
        (lambda e: e["2"].update(obj_id="3"), r"expressions\.0\.\.3\.obj_id are 1, 1, 3, 1"),
    ],
)
def test_sentences_of_davis_that_are_not_in_fours_are_refused(davis, change, said):
    edit(DAVIS, lambda meta: change(meta["videos"]["blackswan"]["expressions"]))(davis)
    with pytest.raises(DataError, match=said) as raised:
        open_split(davis, "valid", source="ref_davis17")
    assert "\n" not in str(raised.value)
