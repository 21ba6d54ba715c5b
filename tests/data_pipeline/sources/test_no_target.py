"""Sentences that name nothing load from every layout; an object that is in no mask is refused."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from film import SIZE, write_film
from layouts import (
    PICKLE,
    SIZES,
    TRUTH,
    image_entry,
    plain_rle,
    segmentation,
    write_davis,
    write_grefs,
    write_refcoco,
    write_youtube,
)
from PIL import Image
from trials import SEED, TRIALS

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Video, names_nothing
from flowmask.models.errors import DataError
from flowmask.models.files import sha256_of

Change = Callable[[Any], Any]
EMPTY = rle.encode(np.zeros(SIZE, bool))


def videos(source: str, root: Path, split: str = "train") -> dict[str, Video]:
    return {v.video_id: v for v in open_source(DataSourceConfig(source=source, root=root, split=split)).videos()}


def edit(path: Path, change: Change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def nothing(video: Video) -> list[str]:
    """Sentences of a video that name nothing; their mask is empty."""
    found = [e for e in video.expressions if names_nothing(video, e)]
    assert video.has_masks and not any(video.mask(e.anno_ids, [0]).any() for e in found)
    return [e.text for e in found]


@pytest.mark.parametrize(
    ("masks", "anno_id"),
    [
        ({}, []),
        ({}, None),
        ({"90": [None] * 12}, [90]),
        ({"90": [EMPTY] * 12}, [90]),
        ({"90": [None, {"size": list(SIZE), "counts": [SIZE[0] * SIZE[1]]}] * 6, "91": [None] * 12}, [90, "91"]),
    ],
)
def test_of_mevis_no_annotation_or_annotations_without_a_pixel_name_nothing(
    mevis: Path, tmp_path: Path, masks: dict[str, Any], anno_id: list[Any]
) -> None:
    shutil.copytree(mevis, tmp_path / "data")
    split = tmp_path / "data/train"
    edit(split / "mask_dict.json", lambda held: held.update(masks))
    edit(
        split / "meta_expressions.json", lambda meta: meta["videos"]["cars"]["expressions"]["1"].update(anno_id=anno_id)
    )
    opened = videos("mevis", tmp_path / "data")
    assert nothing(opened["cars"]) == ["the bright blue disc of cars"]
    assert [e.anno_ids for e in opened["cars"].expressions] == [("2",), (), ("2", "3"), ("2",)]
    assert not nothing(opened["birds"])


def test_a_mask_that_is_empty_beside_one_that_is_not_stays_what_it_was(mevis: Path, tmp_path: Path) -> None:
    shutil.copytree(mevis, tmp_path / "data")
    split = tmp_path / "data/train"
    edit(split / "mask_dict.json", lambda held: held.update({"90": [None] * 12}))
    edit(
        split / "meta_expressions.json", lambda meta: meta["videos"]["cars"]["expressions"]["1"].update(anno_id=[90, 3])
    )
    assert videos("mevis", tmp_path / "data")["cars"].expressions[1].anno_ids == ("90", "3")


@pytest.mark.parametrize("counts", [[], "", "!", [-1], [2**70], 5, [1.5], None, ["a"]])
def test_a_malformed_run_length_is_never_taken_for_an_empty_mask(counts: Any) -> None:
    assert not rle.is_empty({"size": [4, 4], "counts": counts})
    assert not rle.is_empty({}) and not rle.is_empty("a.png") and not rle.is_empty([1])


def test_is_empty_says_what_decoding_says() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(200 * TRIALS):
        size = tuple(rng.integers(1, 40, 2))
        mask = rng.random(size) < rng.choice([0, 0, 0.001, 0.01, 1])
        assert rle.is_empty(rle.encode(mask)) == (not mask.any())


@pytest.mark.parametrize("obj_id", [[], None])
def test_of_ref_youtube_vos_no_object_id_names_nothing(tmp_path: Path, obj_id: Any) -> None:
    write_youtube(tmp_path)
    edit(
        tmp_path / "meta_expressions/train/meta_expressions.json",
        lambda meta: meta["videos"]["0a1b"]["expressions"]["1"].update(obj_id=obj_id),
    )
    opened = videos("ref_youtube_vos", tmp_path)
    assert nothing(opened["0a1b"]) == ["the disc on the right"] and not nothing(opened["2c3d"])


def test_of_ref_davis_four_sentences_name_the_same_or_all_name_nothing(tmp_path: Path) -> None:
    write_davis(tmp_path)
    meta = tmp_path / "meta_expressions/valid/meta_expressions.json"

    def forget(ids: range) -> Change:
        return lambda content: [content["videos"]["blackswan"]["expressions"][str(i)].update(obj_id=[]) for i in ids]

    edit(meta, forget(range(4, 7)))
    with pytest.raises(DataError, match=r"obj_id are nothing, nothing, nothing, 3; the 4 annotators"):
        videos("ref_davis17", tmp_path, "valid")
    edit(meta, forget(range(7, 8)))
    assert len(nothing(videos("ref_davis17", tmp_path, "valid")["blackswan"])) == 4


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    write_refcoco(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", [{}, {"ann_id": []}, {"ann_id": -1}])
def test_of_grefcoco_a_ref_names_several_objects_one_or_none(coco: Path, changes: dict[str, Any]) -> None:
    write_grefs(coco, **changes)
    (image,) = videos("refcoco", coco, "grefcoco/unc/train").values()
    assert [e.anno_ids for e in image.expressions] == [("100", "101"), (), ("101",)]
    assert nothing(image) == ["a giraffe"]
    assert list(videos("refcoco", coco, "grefcoco/unc/val")) == ["coco_000000000007"]


def crowd(*ids: int) -> Change:
    """Make these annotations crowds, which COCO writes as run-lengths of plain numbers."""

    def change(content: Any) -> None:
        for annotation in content["annotations"]:
            if annotation["id"] in ids:
                annotation.update(iscrowd=1, segmentation=plain_rle(TRUTH[annotation["id"]]))

    return change


def test_of_grefcoco_crowds_beside_objects_are_left_out_and_change_what_a_cache_is(coco: Path) -> None:
    write_grefs(coco)
    instances = coco / "grefcoco/instances.json"
    edit(instances, lambda content: [a.update(iscrowd=0) for a in content["annotations"]])

    def masks_identity(split: str) -> str:
        return open_source(DataSourceConfig(source="refcoco", root=coco, split=split)).identity()["masks"]

    assert masks_identity("grefcoco/unc/train") == sha256_of(instances)  # as in older caches
    edit(instances, crowd(100, 102))
    (image,) = videos("refcoco", coco, "grefcoco/unc/train").values()
    assert [e.anno_ids for e in image.expressions] == [("101",), (), ("101",)] and nothing(image) == ["a giraffe"]
    assert np.array_equal(image.mask(("101",), [0])[0], TRUTH[101])
    assert masks_identity("grefcoco/unc/train") != sha256_of(instances) == masks_identity("grefcoco/unc/val")


def test_a_ref_of_crowds_alone_is_refused(coco: Path) -> None:
    write_grefs(coco)
    edit(coco / "grefcoco/instances.json", crowd(101))
    with pytest.raises(DataError, match=r"refs\[2\]\.ann_id names only crowds"):
        videos("refcoco", coco, "grefcoco/unc/train")


def test_a_crowd_of_the_other_sets_is_drawn_as_it_ever_was(coco: Path) -> None:
    before = videos("refcoco", coco, "refcoco/unc/train")["coco_000000581857"].mask(("100",), [0])
    edit(coco / "refcoco/instances.json", crowd(100))
    after = videos("refcoco", coco, "refcoco/unc/train")["coco_000000581857"]
    assert after.expressions[0].anno_ids == ("100",) and np.array_equal(after.mask(("100",), [0]), before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"no_target": False}, r"refs\[1\]: no_target is .False., but ann_id names nothing"),
        ({"ann_id": [101]}, r"no_target is .True., but ann_id names 101"),
        ({"ann_id": [-1, 101], "no_target": False}, "ann_id names -1"),
        ({"ann_id": ["x"]}, "expected an int, or a list of them"),
        ({"ann_id": [103], "no_target": False}, "ann_id names 103, .* for image 581857"),
    ],
)
def test_a_ref_that_contradicts_itself_is_refused(coco: Path, changes: dict[str, Any], said: str) -> None:
    write_grefs(coco, **changes)
    with pytest.raises(DataError, match=said):
        videos("refcoco", coco, "grefcoco/unc/train")


def test_of_cocos_form_an_annotation_marked_empty_names_nothing(coco: Path) -> None:
    images = [{**image_entry(7), "id": i, "original_id": 7, "caption": text} for i, text in enumerate(["bus", "cow"])]
    annotations = [
        {"id": 0, "image_id": 0, "original_id": 103, "segmentation": segmentation(103), "empty": False},
        {"id": 1, "image_id": 1, "original_id": -1, "empty": True, "bbox": [0, 0, 0, 0]},
    ]
    content = json.dumps({"images": images, "annotations": annotations})
    (coco / "refcoco/instances_refcoco_more.json").write_text(content)
    (image,) = videos("refcoco", coco, "refcoco/more").values()
    assert nothing(image) == ["cow"] and image.size == SIZES[7] and (coco / PICKLE).is_file()


def write_list(root: Path, *, frames: int = 5, masks: list[Any]) -> Video:
    root.mkdir(exist_ok=True)
    write_film(root / "film.mp4", frames=frames)
    expressions = [{"text": f"thing {i}", **({} if m == "none" else {"masks": m})} for i, m in enumerate(masks)]
    (root / "train.jsonl").write_text(json.dumps({"video": "film.mp4", "expressions": expressions}))
    return videos("videos", root)["film"]


SHOWN = rle.encode(np.ones(SIZE, bool))


def test_of_a_list_no_mask_or_masks_without_a_pixel_name_nothing(tmp_path: Path) -> None:
    video = write_list(tmp_path, masks=[[SHOWN] * 5, [], [None] * 5, [EMPTY, None] * 2 + [EMPTY]])
    assert nothing(video) == ["thing 1", "thing 2", "thing 3"]
    video.check_masks()
    assert not write_list(tmp_path, masks=["none", None]).has_masks


def test_a_sentence_of_a_list_whose_masks_were_forgotten_is_not_one_that_names_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: expression 1 has no masks, others have; give them, or \[\]"):
        write_list(tmp_path, masks=[[SHOWN] * 5, "none"])


@pytest.mark.parametrize(
    ("masks", "said"), [([None] * 4, "4 masks for the 5 frames"), ("png", "expression 0 show nothing in any frame")]
)
def test_masks_of_a_list_that_cannot_be_meant_are_refused_before_anything_begins(
    tmp_path: Path, masks: Any, said: str
) -> None:
    (tmp_path / "png").mkdir()
    for i in range(5):
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "png" / f"{i}.png")
    with pytest.raises(DataError, match=said):
        write_list(tmp_path, masks=[masks]).check_masks()


def test_an_object_that_no_mask_holds_is_refused_with_those_that_occur(tmp_path: Path) -> None:
    write_youtube(tmp_path)
    (tmp_path / "train/meta.json").unlink()  # without it, opening can't notice the mistake
    meta = tmp_path / "meta_expressions/train/meta_expressions.json"
    edit(meta, lambda content: content["videos"]["0a1b"]["expressions"]["1"].update(obj_id="7"))
    opened = videos("ref_youtube_vos", tmp_path)
    with pytest.raises(DataError, match=r"video 0a1b: expression 1 names object 7, .*0a1b; they hold 1, 3$"):
        opened["0a1b"].check_masks()
    opened["2c3d"].check_masks()


def test_grey_masks_are_told_as_such(tmp_path: Path) -> None:
    write_youtube(tmp_path)
    for path in (tmp_path / "train/Annotations/0a1b").iterdir():
        grey = np.asarray(Image.open(path)).astype(bool).astype(np.uint8) * 255
        Image.fromarray(grey).save(path)
    with pytest.raises(DataError, match=r"names object 1, .* they hold 255: grey pictures of 0 and 255"):
        videos("ref_youtube_vos", tmp_path)["0a1b"].check_masks()


def test_whichever_objects_stand_in_whichever_frames_only_those_that_stand_in_none_are_refused(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    write_youtube(tmp_path)
    (tmp_path / "train/meta.json").unlink()
    folder, video_id = tmp_path / "train/Annotations/0a1b", "0a1b"
    for _ in range(20 * TRIALS):
        held = set()
        for path in sorted(folder.iterdir()):
            indices = np.zeros(SIZE, np.uint8)
            for obj_id in rng.sample([1, 2, 3, 200], rng.randint(0, 2)):
                indices[rng.randrange(48), rng.randrange(64)] = obj_id
            held |= set(np.unique(indices).tolist()) - {0}
            Image.fromarray(indices).save(path)
        named = [rng.choice([1, 2, 3, 200]) for _ in range(3)]
        meta = tmp_path / "meta_expressions/train/meta_expressions.json"
        edit(meta, lambda c, ids=named: [
            c["videos"][video_id]["expressions"][str(i)].update(obj_id=str(obj)) for i, obj in enumerate(ids)
        ])  # fmt: skip
        video = open_source(DataSourceConfig(source="ref_youtube_vos", root=tmp_path)).videos()[0]
        from flowmask.data_pipeline.sources import ref_youtube_vos

        ref_youtube_vos._index_map.cache_clear()
        if set(named) <= held:
            video.check_masks()
        else:
            with pytest.raises(DataError, match=f"object {min(set(named) - held)},"):
                video.check_masks()
