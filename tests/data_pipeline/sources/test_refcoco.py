"""Laws of RefCOCO in both layouts: one video per image, the same masks, and a pickle that can run no code."""

import json
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from layouts import COCO_JSON, INSTANCES, PICKLE, TRUTH, write_refcoco
from PIL import Image

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.config import CacheSourceConfig, DataSourceConfig
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.sources import open_source
from flowmask.models.errors import DataError


@pytest.fixture(scope="module")
def refcoco(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    write_refcoco(root)
    return root


@pytest.fixture
def copy(refcoco, tmp_path) -> Path:
    return shutil.copytree(refcoco, tmp_path / "data")


FORMS = ("refcoco/train", "refcoco/unc/train")


def open_split(root, split):
    return open_source(DataSourceConfig(source="refcoco", root=root, split=split))


@pytest.mark.parametrize("split", FORMS)
def test_all_sentences_of_an_image_are_one_video_of_one_frame(refcoco, split):
    people, sky = open_split(refcoco, split).videos()
    assert (people.video_id, sky.video_id) == ("coco_000000581857", "coco_000000098304")
    assert people.frame_names == ("COCO_train2014_000000581857",)
    assert (people.size, sky.size) == ((48, 64), (40, 56)) and people.has_masks
    assert [e.text for e in people.expressions] == ["the Man in red", "left man", "woman on the right"]
    assert [e.anno_ids for e in people.expressions] == [("100",), ("100",), ("101",)]
    path = refcoco / "train2014/COCO_train2014_000000098304.jpg"
    assert np.array_equal(sky.frames([0])[0], np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("split", FORMS)
def test_masks_are_the_pixels_of_polygons_and_run_lengths(refcoco, split):
    people, sky = open_split(refcoco, split).videos()
    for video, anno_ids in ((people, ("100",)), (people, ("100", "101")), (sky, ("102",))):
        truth = np.any([TRUTH[int(anno_id)] for anno_id in anno_ids], axis=0)
        mask = video.mask(anno_ids, [0, 0])
        assert mask.dtype == bool and np.array_equal(mask, [truth, truth])


def test_a_split_holds_only_its_own_images_in_both_forms(refcoco):
    for split in ("refcoco/val", "refcoco/unc/val"):
        assert [video.video_id for video in open_split(refcoco, split).videos()] == ["coco_000000000007"]


def test_the_same_image_has_the_same_id_in_every_set(refcoco, copy):
    shutil.copytree(copy / "refcoco", copy / "refcocog")
    (copy / "refcocog/refs(unc).p").rename(copy / "refcocog/refs(umd).p")
    other = open_split(copy, "refcocog/umd/train").videos()
    assert {v.video_id for v in other} == {v.video_id for v in open_split(refcoco, FORMS[0]).videos()}


def test_the_identity_tells_splits_and_contents_apart_but_not_places(refcoco, copy):
    identities = {split: open_split(refcoco, split).identity() for split in (*FORMS, "refcoco/unc/val")}
    assert len({identity["expressions"] for identity in identities.values()}) == 3
    assert open_split(copy, FORMS[1]).identity() == identities[FORMS[1]]
    edit(INSTANCES, lambda content: content["annotations"][0]["segmentation"].pop())(copy)
    after = open_split(copy, FORMS[1]).identity()
    assert after["masks"] != identities[FORMS[1]]["masks"]
    assert after["expressions"] == identities[FORMS[1]]["expressions"]


def test_a_sentence_that_normalising_emptied_is_read_as_it_was_typed(copy):
    edit(PICKLE, lambda refs: refs[1]["sentences"][0].update(sent="", raw="SKY?"))(copy)
    assert open_split(copy, FORMS[1]).videos()[1].expressions[0].text == "SKY?"


@pytest.mark.parametrize("place", ["images/train2014", "images/mscoco/images/train2014"])
def test_images_are_found_where_other_tools_keep_them(copy, place):
    (copy / place).parent.mkdir(parents=True)
    (copy / "train2014").rename(copy / place)
    assert open_split(copy, FORMS[0]).videos()[0].frames([0])[0].shape == (48, 64, 3)


def edit(name, change):
    """A change to the parsed content of a file of the dataset."""
    codec = pickle if name.endswith(".p") else json

    def spoil(root):
        path = root / name
        content = codec.loads(path.read_bytes())
        change(content)
        written = codec.dumps(content)
        path.write_bytes(written if isinstance(written, bytes) else written.encode())

    return spoil


COCO_SPOILED = [
    (lambda root: shutil.rmtree(root / "train2014"), "holds no COCO images; expected them in one of train2014"),
    (lambda root: shutil.rmtree(root / "refcoco"), "refcoco: no such folder"),
    (lambda root: (root / COCO_JSON).unlink(), "instances_refcoco_train.json is missing"),
    (lambda root: (root / COCO_JSON).write_text("{"), "train.json: no valid JSON"),
    (lambda root: (root / COCO_JSON).write_text("[]"), "has no field 'annotations'"),
    (lambda root: (root / COCO_JSON).write_text('{"images": [], "annotations": []}'), "the dataset is empty"),
    (edit(COCO_JSON, lambda c: c.pop("images")), "has no field 'images'"),
    (edit(COCO_JSON, lambda c: c["images"][1].pop("caption")), r"images\[1\] has no field 'caption'"),
    (edit(COCO_JSON, lambda c: c["images"][1].update(caption=" ")), r"images\[1\]\.caption is .*an empty sentence"),
    (edit(COCO_JSON, lambda c: c["images"][1].pop("original_id")), r"images\[1\] has no field 'original_id'"),
    (edit(COCO_JSON, lambda c: c["images"][0].pop("file_name")), r"images\[0\] has no field 'file_name'"),
    (edit(COCO_JSON, lambda c: c["images"][1].pop("file_name")), r"images\[1\] has no field 'file_name'"),
    (edit(COCO_JSON, lambda c: c["images"][1].update(file_name="b.jpg")), r"images\[1\]\.file_name is 'b\.jpg', but"),
    (edit(COCO_JSON, lambda c: c["images"][0].update(height="x")), r"images\[0\]\.height is 'x'; expected a int"),
    (edit(COCO_JSON, lambda c: c["images"][1].update(id=1)), r"images\[1\]\.id is 1, as of an earlier"),
    (edit(COCO_JSON, lambda c: c["annotations"].pop(0)), r"images\[0\]\.id is 1, which no annotation"),
    (edit(COCO_JSON, lambda c: c["annotations"][2].pop("image_id")), r"annotations\[2\] has no field 'image_id'"),
    (edit(COCO_JSON, lambda c: c["annotations"][2].pop("segmentation")), "annotation 102 has no field 'segmentation'"),
]  # fmt: skip
PICKLE_SPOILED = [
    (lambda root: (root / PICKLE).unlink(), r"refs\(unc\)\.p is missing"),
    (lambda root: (root / PICKLE).write_bytes(b""), r"refs\(unc\)\.p: no valid pickle"),
    (lambda root: (root / PICKLE).write_bytes(b"not a pickle"), r"refs\(unc\)\.p: no valid pickle"),
    (lambda root: (root / PICKLE).write_bytes((root / PICKLE).read_bytes()[:99]), "no valid pickle"),
    (lambda root: (root / PICKLE).write_bytes(pickle.dumps({})), "holds a dict; expected a list of refs"),
    (lambda root: (root / PICKLE).write_bytes(pickle.dumps([])), "has no split 'train'; it has none"),
    (edit(PICKLE, lambda refs: [ref.update(split="testA") for ref in refs]), "no split 'train'; it has 'testA'"),
    (edit(PICKLE, lambda refs: refs[2].pop("split")), r"refs\[2\] has no field 'split'"),
    (edit(PICKLE, lambda refs: refs[2].update(image_id=5)), r"refs\[2\]\.image_id names 5, which .*instances\.json"),
    (edit(PICKLE, lambda refs: refs[2].update(ann_id=5)), r"refs\[2\]\.ann_id names 5, which .*instances\.json"),
    (edit(PICKLE, lambda refs: refs[2].update(ann_id=102)), r"refs\[2\]\.ann_id names 102, .*for image 581857"),
    (edit(PICKLE, lambda refs: refs[0].update(sentences={})), r"refs\[0\]\.sentences is '{}'; expected a list"),
    (edit(PICKLE, lambda refs: refs[0]["sentences"][1].pop("sent")), r"sentences\[1\] has no field 'sent'"),
    (edit(PICKLE, lambda refs: refs[0]["sentences"][1].update(sent="", raw="")), r"\.sent is '': an empty sentence"),
    (lambda root: (root / INSTANCES).unlink(), "refcoco/instances.json is missing"),
    (edit(INSTANCES, lambda c: c["images"][0].pop("id")), r"images\[0\] has no field 'id'"),
    (edit(INSTANCES, lambda c: c["images"][0].pop("width")), "image 581857 has no field 'width'"),
]  # fmt: skip
SPOILED = [(FORMS[0], *case) for case in COCO_SPOILED] + [(FORMS[1], *case) for case in PICKLE_SPOILED]


@pytest.mark.parametrize(("split", "spoil", "said"), SPOILED)
def test_a_spoiled_dataset_is_refused_in_one_line(copy, split, spoil, said):
    spoil(copy)
    with pytest.raises(DataError, match=said) as raised:
        open_split(copy, split)
    assert "\n" not in str(raised.value) and str(copy) in str(raised.value)


@pytest.mark.parametrize("split", ["train", "", "refcoco/", "refcoco/unc/train/x"])
def test_a_split_of_another_form_is_refused_with_the_two_that_are_known(refcoco, split):
    with pytest.raises(DataError, match=r"data\.split is .*refcoco/train.*refcocog/umd/val"):
        open_split(refcoco, split)


def test_an_image_of_another_size_is_refused_with_its_path(copy):
    path = copy / "train2014/COCO_train2014_000000098304.jpg"
    Image.new("RGB", (56, 41)).save(path)
    with pytest.raises(DataError, match=r"images\[2\]: height x width is 40x56, but .*98304\.jpg has 41x56"):
        open_split(copy, FORMS[0]).videos()[1].frames([0])
    path.unlink()
    with pytest.raises(DataError, match=r"98304\.jpg: the frame is missing"):
        open_split(copy, FORMS[0]).videos()[1].frames([0])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "expected a list of polygons"),
        ("text", "expected a list of polygons"),
        ([[1, 2, 3]], "not a list of finite"),
        (rle.encode(np.ones((3, 4), bool)), "the RLE is 3x4"),
        ({"counts": [1]}, "expected a COCO RLE"),
    ],
)
def test_a_bad_segmentation_is_refused_with_its_annotation(copy, value, said):
    edit(COCO_JSON, lambda c: c["annotations"][2].update(segmentation=value))(copy)
    video = open_split(copy, FORMS[0]).videos()[1]
    with pytest.raises(DataError, match=rf"train\.json: annotation 102\.segmentation: .*{said}"):
        video.mask(("102",), [0])


class Malicious:
    """A pickle that calls os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused_without_running_it(copy, tmp_path, protocol):
    trap = tmp_path / "trap"
    payload = pickle.dumps([Malicious(trap)], protocol=protocol)
    (copy / PICKLE).write_bytes(payload)
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: the pickle asks for \w+\.mkdir; only plain data"):
        open_split(copy, FORMS[1])
    assert not trap.exists()
    pickle.loads(payload)  # noqa: S301 - the trap was a live one
    assert trap.exists()


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"(S'x'\nios\nmkdir\n.", r"the pickle asks for os\.mkdir"),  # INST
        (b"(cos\nmkdir\nS'x'\no.", r"the pickle asks for os\.mkdir"),  # OBJ
        (b"\x82\x01.", "no valid pickle"),  # EXT1 of an empty registry
        (b"P1\n.", "no valid pickle"),  # PERSID
        (b"}}S'x'\nK\x01sb.", "no valid pickle"),  # BUILD
        (b"\x80\x04\x8c\x01xR.", "no valid pickle"),  # REDUCE of nothing
        (b"S'\xff\xfe'\n.", "no valid pickle"),
        (pickle.dumps([OrderedDict(a=1)]), r"asks for collections\.OrderedDict"),
        (pickle.dumps([np.float64(1)]), r"asks for numpy"),
        (pickle.dumps([{"a": {1, 2}}], protocol=4), "the pickle holds a set"),
        (pickle.dumps([{(1, (2, frozenset([3]))): 1}], protocol=4), "the pickle holds a frozenset"),
        (pickle.dumps([bytearray(b"x")], protocol=5), "the pickle holds a bytearray"),
        (pickle.dumps([1j]), r"asks for builtins\.complex"),
    ],
)
def test_a_pickle_of_more_than_plain_data_is_refused_with_the_class(copy, payload, said):
    (copy / PICKLE).write_bytes(payload)
    with pytest.raises(DataError, match=said) as raised:
        open_split(copy, FORMS[1])
    assert "\n" not in str(raised.value) and PICKLE in str(raised.value)


def test_plain_data_of_every_kind_is_admitted_also_if_it_holds_itself(copy):
    def add(refs):
        everything = {"a": [1, 2**70, 1.5, True, None, b"x", "é", (1, [2])]}
        everything["self"] = everything
        refs[0]["more"] = everything

    edit(PICKLE, add)(copy)
    assert len(open_split(copy, FORMS[1]).videos()) == 2


@pytest.mark.parametrize("split", FORMS)
def test_a_cache_of_one_frame_clips_is_whole(refcoco, make_config, tmp_path, split):
    data = CacheSourceConfig(source="refcoco", root=refcoco, split=split)
    config = make_config(tmp_path / "cache", clip={"frames": 1}).model_copy(update={"data": data})
    build(config)
    report = verify(config.out)
    assert report.ok, report.problems
    assert (report.records, report.examples) == (4, 8)  # two views of two images with three and one sentences
