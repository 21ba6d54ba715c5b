"""A2D-Sentences and JHMDB-Sentences: the values of small sets in their layouts, and the refusals."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from film import SIZE
from sparse_layouts import FRAMES, box, write_a2d, write_h5, write_jhmdb, write_listed

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.sources import a2d_sentences, jhmdb_sentences, open_source
from flowmask.models.errors import DataError

A2D_LIST, JHMDB_LIST = "a2d_sentences_single_frame_train_annotations.json", "jhmdb_sentences_samples_metadata.json"
H5 = "text_annotations/a2d_annotation_with_instances/bird/00002.h5"


def open_one(source: str, root: Path, split: str) -> Any:
    (video,) = open_source(DataSourceConfig(source=source, root=root, split=split)).videos()
    return video


@pytest.fixture
def a2d(tmp_path: Path) -> Path:
    pytest.importorskip("h5py")
    write_a2d(tmp_path)
    a2d_sentences._instances.cache_clear()
    return tmp_path


@pytest.fixture
def jhmdb(tmp_path: Path) -> Path:
    write_jhmdb(tmp_path)
    jhmdb_sentences._part_masks.cache_clear()
    return tmp_path


def test_a_sentence_of_a2d_is_known_in_the_frames_that_its_entries_name(a2d: Path) -> None:
    bird = open_one("a2d_sentences", a2d, "train")
    assert (bird.video_id, bird.size, len(bird.frame_names), bird.has_masks) == ("bird", SIZE, FRAMES, True)
    assert [(e.text, e.anno_ids) for e in bird.expressions] == [("a bird  flying", ("1",)), ("other bird", ("3",))]
    assert bird.annotated(("1",)) == {1, 4} and bird.annotated(("3",)) == {1} and bird.annotated(()) == {1, 4}
    assert np.array_equal(bird.mask(("1",), [1, 2, 4]), [box(1), np.zeros(SIZE, bool), box(4)])
    assert np.array_equal(bird.mask(("1", "3"), [1]), [box(1) | box(1, 3)])
    bird.check_masks()
    source = a2d_sentences.A2dSentencesSource
    assert source.evaluation_splits(a2d, split="train") == ["test"] and source.split_ids(a2d, "test") == {"cat"}


def test_an_instance_of_a2d_that_its_frame_does_not_hold_is_refused_with_those_it_has(a2d: Path) -> None:
    write_h5(a2d / H5, {1: box(1), 2: box(1, 3)})
    with pytest.raises(DataError, match=r"video bird: a sentence names instance 3, which .*00002\.h5 .*; it has 1, 2"):
        open_one("a2d_sentences", a2d, "train").check_masks()


def spoil_h5(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        import h5py

        with h5py.File(path, "a") as file:
            change(file)

    return spoil


def replace(name: str, value: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        file[name] = value

    return change


def link_outside(file: Any) -> None:
    import h5py

    del file["reMask"]
    file["reMask"] = h5py.ExternalLink("00005.h5", "/reMask")


def huge(file: Any) -> None:
    del file["reMask"]
    file.create_dataset("reMask", shape=(2, 2**20, 2**12), dtype="u1", chunks=True)  # takes no space in the file


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"no HDF5"), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "cannot be read"),
        (spoil_h5(lambda file: file.pop("reMask")), "not an array of numbers in the file itself"),
        (spoil_h5(replace("instance", np.array([1.0, 2, 3]))), "3 instances, but reMask is"),
        (spoil_h5(replace("reMask", np.ones((2, 9, 9), np.uint8))), "the masks are 9x9 .* its video 48x64"),
        (spoil_h5(replace("reMask", "text")), "not an array of numbers"),
        (spoil_h5(link_outside), "not an array of numbers in the file itself"),
        (spoil_h5(huge), "more than any mask of A2D"),
    ],
)
def test_a_bad_mask_file_of_a2d_is_one_line(a2d: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(a2d / H5)
    with pytest.raises(DataError, match=said) as raised:
        open_one("a2d_sentences", a2d, "train").mask(("1",), [1])
    assert "\n" not in str(raised.value) and str(a2d / H5) in str(raised.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (["a", "bird", 2], r"\[3\] is .*; expected \[sentence, video, frame, instance\]"),
        ([" ", "bird", 2, 1], "an empty sentence"),
        (["a", "bird", 0, 1], "frame '0' and instance '1'; expected numbers"),
        (["a", "bird", 2, "1 (copy)"], r"instance '1 \(copy\)'; expected numbers"),
        (["a", "", 2, 1], r"\[3\]\[1\] is ''; expected a name"),
    ],
)
def test_a_bad_entry_of_a2ds_list_is_one_line(a2d: Path, entry: list[Any], said: str) -> None:
    listed = json.loads((a2d / A2D_LIST).read_text())
    (a2d / A2D_LIST).write_text(json.dumps([*listed, entry]))
    with pytest.raises(DataError, match=said):
        open_one("a2d_sentences", a2d, "train")


def test_a_frame_beyond_the_end_of_its_video_is_refused(a2d: Path) -> None:
    (a2d / A2D_LIST).write_text(json.dumps([["a bird", "bird", FRAMES + 1, 1]]))
    with pytest.raises(DataError, match=r"the list names frame 7, but .*bird\.mp4 has 6"):
        open_one("a2d_sentences", a2d, "train").annotated(())


def test_without_h5py_opening_a2d_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"HDF5 files, which need h5py: pip install 'flowmask\[a2d\]'"):
        open_source(DataSourceConfig(source="a2d_sentences", root=tmp_path))


def test_jhmdbs_person_is_known_in_the_frames_that_its_list_names(jhmdb: Path) -> None:
    man = open_one("jhmdb_sentences", jhmdb, "test")
    assert (man.video_id, man.size, man.frame_names[0], len(man.frame_names)) == ("man_1", SIZE, "00001", FRAMES)
    assert [(e.text, e.anno_ids) for e in man.expressions] == [("man running", ("0",))]
    assert man.annotated(("0",)) == {1, 5}
    assert np.array_equal(man.mask(("0",), [1, 2, 5]), [box(1), np.zeros(SIZE, bool), box(5)])
    assert [frame[0, 0, 0] for frame in man.frames([0, 3])] == [0, 90]
    man.check_masks()
    with pytest.raises(DataError, match=r"data\.split is 'train'; JHMDB-Sentences is for scoring only"):
        open_source(DataSourceConfig(source="jhmdb_sentences", root=jhmdb))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (1, "./jhmdb_sentences/Rename_Images/run/man_1/00007.png", "names frame '00007.png'; the video has 6"),
        (1, "./jhmdb_sentences/Rename_Images/run/man_1/first.png", "names frame 'first.png'"),
        (1, "/etc/passwd", "expected a path in Rename_Images or puppet_mask"),
        (1, "a/Rename_Images/../../../etc/00001.png", "expected a path in Rename_Images"),
        (2, "./jhmdb_sentences/puppet_mask/run/other/puppet_mask.mat", "has another folder, masks or number of frames"),
        (3, 7, "has another folder, masks or number of frames"),
        (4, 5, r"\[1\]\[4\] is .5.; it must be a sentence"),
    ],
)
def test_a_bad_entry_of_jhmdbs_list_is_one_line(jhmdb: Path, place: int, value: Any, said: str) -> None:
    listed = json.loads((jhmdb / JHMDB_LIST).read_text())
    listed[1][place] = value
    (jhmdb / JHMDB_LIST).write_text(json.dumps(listed))
    with pytest.raises(DataError, match=said) as raised:
        open_one("jhmdb_sentences", jhmdb, "test")
    assert JHMDB_LIST in str(raised.value)


def save(**variables: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        from scipy.io import savemat

        savemat(path, variables)

    return write


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"no MATLAB file" * 40), "no valid MATLAB file|cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "no valid MATLAB file|cannot be read"),
        (save(other=np.ones((48, 64, 6))), "no valid MATLAB file"),
        (save(part_mask=np.ones((48, 64))), r"expected \[H W F\]"),
        (save(part_mask=np.ones((24, 32, 6))), "6 masks of 24x32 .* are 48x64"),
        (save(part_mask=np.ones((48, 64, 1))), "1 masks of 48x64 .* names frame 2"),
        (save(part_mask=np.full((2, 2, 2), "x", object)), "expected numbers"),
    ],
)
def test_a_bad_mask_file_of_jhmdb_is_one_line(jhmdb: Path, spoil: Callable[[Path], None], said: str) -> None:
    path = jhmdb / "puppet_mask/run/man_1/puppet_mask.mat"
    spoil(path)
    with pytest.raises(DataError, match=said) as raised:
        open_one("jhmdb_sentences", jhmdb, "test").mask(("0",), [1])
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_masks_that_show_nobody_are_refused(jhmdb: Path) -> None:
    masks = np.stack([box(i) for i in range(FRAMES)], axis=2)
    masks[:, :, [1, 5]] = False
    save(part_mask=masks.astype(np.uint8))(jhmdb / "puppet_mask/run/man_1/puppet_mask.mat")
    with pytest.raises(DataError, match=r"video man_1: .*puppet_mask\.mat shows no person in the frames"):
        open_one("jhmdb_sentences", jhmdb, "test").check_masks()


@pytest.mark.parametrize("listed", [[], [2, 1], [1, 1], [-1], [True], "1", [1.0]])
def test_a_listed_videos_annotated_frames_are_numbers_that_rise(tmp_path: Path, listed: Any) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: annotated is .*expected frame numbers"):
        open_one("videos", write_listed(tmp_path, annotated=listed), "train")


def test_a_listed_video_says_which_frames_are_annotated_and_may_list_masks_of_these_alone(tmp_path: Path) -> None:
    video = open_one("videos", write_listed(tmp_path, annotated=[1, 4]), "train")
    anno_ids = video.expressions[0].anno_ids
    assert video.annotated(anno_ids) == (1, 4) and not video.mask(anno_ids, [2]).any()
    entry = json.loads((tmp_path / "train.jsonl").read_text())
    entry["expressions"][0]["masks"] = [entry["expressions"][0]["masks"][i] for i in (1, 4)]
    (tmp_path / "train.jsonl").write_text(json.dumps(entry))
    short = open_one("videos", tmp_path, "train")
    for i in range(FRAMES):
        assert np.array_equal(short.mask(short.expressions[0].anno_ids, [i]), video.mask(anno_ids, [i]))
    entry["annotated"] = [1, 9]
    (tmp_path / "train.jsonl").write_text(json.dumps(entry))
    with pytest.raises(DataError, match=r"annotated names frame 9; .*film\.mp4 ends at 5"):
        open_one("videos", tmp_path, "train").annotated(())


def test_a_sparse_set_is_cached_as_single_annotated_frames(a2d: Path, make_config: Any, tmp_path: Path) -> None:
    config = make_config(tmp_path / "cache", cache={"views": 1, "leaks": "allow"}, clip={"augment": False})
    data = {"source": "a2d_sentences", "root": a2d, "split": "train"}
    config = type(config).model_validate({**config.model_dump(), "data": data})
    build(config)
    reader = CacheReader(tmp_path / "cache")
    seen = {(tuple(reader.record(i)["frame_ids"]), reader.sentence(i)) for i in range(reader.manifest.examples)}
    assert seen == {((1,), "a bird flying"), ((1,), "other bird"), ((4,), "a bird flying")}
    assert [bucket.frames for bucket in reader.manifest.buckets] == [1] * len(reader.manifest.buckets)
    assert verify(tmp_path / "cache").ok and not reader.manifest.partly_annotated
