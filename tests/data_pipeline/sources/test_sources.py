"""Laws of the sources: the values that they read, and one line with file and field for each mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from film import write_film
from PIL import Image

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.synthetic import write_synthetic
from flowmask.data_pipeline.video.video_file import VideoFile
from flowmask.models.errors import ConfigError, DataError


def open_mevis(root):
    return open_source(DataSourceConfig(source="mevis", root=root, split="train"))


def test_frames_sentences_and_unions_of_masks_are_those_on_disk(mevis):
    birds, cars, _ = open_mevis(mevis).videos()
    assert (birds.video_id, birds.size, len(birds.frame_names)) == ("birds", (48, 64), 7)
    assert birds.expressions[2].anno_ids == ("0", "1")
    path = mevis / "train/JPEGImages/cars/00015.jpg"
    assert np.array_equal(cars.frames([3])[0], np.asarray(Image.open(path).convert("RGB")))
    both, square, disc = (birds.mask(ids, [0, 6]) for ids in (("0", "1"), ("0",), ("1",)))
    assert np.array_equal(both, square | disc)
    assert square[0, 15, 5] and not disc[1].any()


def test_frames_are_given_in_the_order_asked_for(mevis):
    video = open_mevis(mevis).videos()[0]
    one, two, again = video.frames([4, 1, 4])
    assert np.array_equal(one, again) and not np.array_equal(one, two)


def test_a_split_without_public_masks_opens_but_has_none(mevis, tmp_path):
    shutil.copytree(mevis, tmp_path / "data")
    (tmp_path / "data/train/mask_dict.json").unlink()
    videos = open_mevis(tmp_path / "data").videos()
    assert not any(video.has_masks for video in videos)


def edit(name, change):
    """A change to the parsed JSON of a file of the split."""

    def spoil(split):
        content = json.loads((split / name).read_text())
        change(content)
        (split / name).write_text(json.dumps(content))

    return spoil


META, MASKS = "meta_expressions.json", "mask_dict.json"


def expression(change):
    return edit(META, lambda meta: change(meta["videos"]["cars"]["expressions"]["1"]))


SPOILED = [
    (lambda split: shutil.rmtree(split), "no such dataset folder"),
    (lambda split: shutil.rmtree(split / "JPEGImages"), "JPEGImages is missing"),
    (lambda split: (split / META).unlink(), "meta_expressions.json is missing"),
    (lambda split: (split / META).write_text("{"), "meta_expressions.json: no valid JSON"),
    (lambda split: (split / META).write_bytes(b"\xff\xfe\x00"), "meta_expressions.json: no valid JSON"),
    (lambda split: (split / META).write_text("{}"), "no field 'videos'"),
    (lambda split: (split / META).write_text('{"videos": {}}'), "the dataset is empty"),
    (lambda split: (split / MASKS).write_text("[]"), "mask_dict.json: expected an object"),
    (lambda split: (split / MASKS).write_text("nul"), "mask_dict.json: no valid JSON"),
    (edit(META, lambda meta: meta["videos"]["cars"].pop("frames")), r"videos\.cars has no field 'frames'"),
    (edit(META, lambda meta: meta["videos"]["cars"].update(frames=[])), r"videos\.cars\.frames is empty"),
    (edit(META, lambda meta: meta["videos"]["cars"].pop("expressions")), "no field 'expressions'"),
    (expression(lambda entry: entry.pop("exp")), r"cars\.expressions\.1 has no field 'exp'"),
    (expression(lambda entry: entry.update(exp="")), r"1\.exp is '': an empty sentence"),
    (expression(lambda entry: entry.update(exp=' "" ')), "an empty sentence"),
    (expression(lambda entry: entry.update(exp=5)), r"1\.exp is '5'; expected a str"),
    (expression(lambda entry: entry.pop("anno_id")), "no field 'anno_id'"),
    (expression(lambda entry: entry.update(anno_id=[99])), "anno_id names 99"),
    (edit(MASKS, lambda masks: masks["3"].pop()), "annotation 3 has 11 masks, its video 12 frames"),
    (edit(MASKS, lambda masks: masks.update({"3": None})), "anno_id names 3"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILED)
def test_a_spoiled_dataset_is_refused_in_one_line(mevis, tmp_path, spoil, said):
    shutil.copytree(mevis, tmp_path / "data")
    spoil(tmp_path / "data" / "train")
    with pytest.raises(DataError, match=said) as raised:
        open_mevis(tmp_path / "data")
    assert "\n" not in str(raised.value)


def test_a_mask_of_another_size_is_refused_with_annotation_and_frame(mevis, tmp_path):
    shutil.copytree(mevis, tmp_path / "data")
    other = rle.encode(np.ones((64, 48), bool))
    edit(MASKS, lambda masks: masks["2"].__setitem__(4, other))(tmp_path / "data" / "train")
    with pytest.raises(DataError, match=r"annotation 2, frame 00020: the RLE is 64x48"):
        open_mevis(tmp_path / "data").videos()[1].mask(("2",), [3, 4])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "the frame is missing"),
        (lambda path: path.write_bytes(b"no image"), "not a readable image"),
        (lambda path: path.write_bytes(path.read_bytes()[:700]), "truncated"),
        (lambda path: Image.new("RGB", (10, 10)).save(path), "10x10 px"),
    ],
)
def test_a_bad_frame_is_refused_with_its_path(mevis, tmp_path, spoil, said):
    shutil.copytree(mevis, tmp_path / "data")
    spoil(tmp_path / "data/train/JPEGImages/cars/00015.jpg")
    with pytest.raises(DataError, match=rf"00015\.jpg: .*{said}") as raised:
        open_mevis(tmp_path / "data").videos()[1].frames([2, 3])
    assert "\n" not in str(raised.value)


def test_an_unknown_source_lists_the_known_ones(tmp_path):
    known = "a2d_sentences, jhmdb_sentences, long_rvos, mevis, ref_davis17, ref_youtube_vos, refcoco, revos, synthetic"
    with pytest.raises(ConfigError, match=f"known: {known}, videos"):
        open_source(DataSourceConfig(source="mevi", root=tmp_path))


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """A real H.264 file of ten frames, 64x48. Its index is in front, so that a cut file still opens."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(path, frames=10)
    return path


def write_list(folder, film, **expression):
    shutil.copy(film, folder / "film.mp4")
    entry = {"video": "film.mp4", "expressions": [{"text": "the clock", **expression}]}
    (folder / "list.jsonl").write_text(json.dumps(entry) + "\n")
    return open_source(DataSourceConfig(source="videos", root=folder / "list.jsonl")).videos()


def test_a_listed_video_gives_frames_and_masks_of_rle_or_png(film, tmp_path):
    masks = np.random.default_rng(0).random((10, 48, 64)) > 0.7
    (tmp_path / "png").mkdir()
    for i, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "png" / f"{i:03d}.png")
    listed = [f"png/{i:03d}.png" for i in range(10)]
    for given in ([rle.encode(mask) for mask in masks], "png", listed):
        (video,) = write_list(tmp_path, film, masks=given)
        assert video.has_masks and video.size == (48, 64) and len(video.frame_names) == 10
        assert len(video.frames([0, 9, 0])) == 3
        assert np.array_equal(video.mask(video.expressions[0].anno_ids, [2, 5]), masks[[2, 5]])


def test_a_listed_video_needs_no_masks(film, tmp_path):
    (video,) = write_list(tmp_path, film)
    assert not video.has_masks and video.expressions[0].text == "the clock"


def test_a_mask_that_is_not_there_is_told_before_anything_is_read(film, tmp_path):
    for given in ("gone", ["gone"] * 10):
        (video,) = write_list(tmp_path, film, masks=given)
        assert video.missing_file([0]) == tmp_path / "gone"
    (tmp_path / "gone").mkdir()
    assert write_list(tmp_path, film, masks="gone")[0].missing_file([0]) is None


def test_a_list_of_masks_of_another_length_is_refused(film, tmp_path):
    shown = rle.encode(np.ones((48, 64), bool))
    (video,) = write_list(tmp_path, film, masks=[shown] * 9)
    with pytest.raises(DataError, match=r"list\.jsonl:1: 9 masks for the 10 frames"):
        video.mask(video.expressions[0].anno_ids, [0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"list\.jsonl:1: no valid JSON"),
        ('{"video": "a.mp4" "x": 1}', r"list\.jsonl:1: no valid JSON \(Expecting ',' delimiter: column 19\)"),
        ('{"vidio": "a.mp4", "expressions": []}', "has an unknown field 'vidio'; did you mean 'video'"),
        (
            '{"video": "a.mp4", "expressions": [{"text": "x", "mask": "m"}]}',
            r"list\.jsonl:1: expressions\[0\] has an unknown field 'mask'; did you mean 'masks'\?",
        ),
        ("[]", "no field 'video'"),
        ('{"video": "a.mp4", "expressions": [{"text": "x", "masks": ""}]}', r"masks is ''; expected a folder"),
        ("file,text\n" * 9, r"^[^;]*list\.jsonl:1: no valid JSON \(file,text\); a line is one video"),
        ('[\n{"video": "a.mp4"}\n]', r"^[^;]*list\.jsonl:1: no valid JSON \(\[\); a line is one video"),
        ('{"video": "a.mp4"}', "no field 'expressions'"),
        ('{"video": "a.mp4", "expressions": [{"text": " "}]}', "an empty sentence"),
        ('{"video": "a.mp4", "expressions": []}', "the dataset is empty"),
        ("", "the dataset is empty"),
        ('{"video": "a.mp4", "expressions": [{"text": "x"}]}\n' * 2, "'a' names two videos"),
    ],
)
def test_a_bad_list_is_refused_with_its_line(tmp_path, text, said):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        open_source(DataSourceConfig(source="videos", root=tmp_path / "list.jsonl"))


def test_fields_of_one_s_own_are_allowed_beside_the_known_ones(film, tmp_path):
    line = {"video": film.name, "videos": 1, "expressions": [{"text": "x", "text_id": 7, "masks": []}], "note": "n"}
    (film.parent / "own.jsonl").write_text(json.dumps(line))
    (video,) = open_source(DataSourceConfig(source="videos", root=film.parent / "own.jsonl")).videos()
    assert [one.text for one in video.expressions] == ["x"]


def test_a_truncated_video_is_refused_wherever_it_was_cut(film, tmp_path):
    content = film.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.8):
        path = tmp_path / f"cut{share}.mp4"
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match="truncated") as raised:
            VideoFile(path).frames(range(10))
        assert "\n" not in str(raised.value)


def test_what_is_left_of_a_listed_video_is_read_when_the_config_allows_it(film, tmp_path):
    masks = [rle.encode(np.full((48, 64), i % 2 == 0)) for i in range(10)]
    write_list(tmp_path, film, masks=masks)
    path = tmp_path / "film.mp4"
    path.write_bytes(path.read_bytes()[:-150])
    data = DataSourceConfig(source="videos", root=tmp_path / "list.jsonl")
    (video,) = open_source(data).videos()
    with pytest.raises(DataError, match=r"of 10 frames can be read .*data\.allow_truncated=true"):
        _ = video.frame_names
    (video,) = open_source(data.model_copy(update={"allow_truncated": True})).videos()
    left = len(video.frame_names)
    assert 0 < left < 10
    mask = video.mask(video.expressions[0].anno_ids, range(left))
    assert mask.shape == (left, 48, 64) and mask[0].all() and not mask[1].any()


def test_a_layout_without_video_files_has_no_truncated_ones_to_allow(tmp_path):
    write_synthetic(tmp_path, split="train", videos=1, seed=0)
    with pytest.raises(ConfigError, match=r"data\.allow_truncated is set, but mevis has no video files"):
        open_source(DataSourceConfig(source="mevis", root=tmp_path, allow_truncated=True))


def test_a_missing_video_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such video file"):
        VideoFile(tmp_path / "none.mp4")
