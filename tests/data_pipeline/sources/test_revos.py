"""Laws of ReVOS: splits share frames and masks, a sentence has a kind, and one line for each mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import SIZE, index_map, write_revos

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.config import CacheSourceConfig, DataSourceConfig
from flowmask.data_pipeline.plan.leaks import family_of
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import VideoSet, names_nothing
from flowmask.data_pipeline.sources.revos import RevosSource
from flowmask.models.errors import DataError

VALID, TRAIN, MASKS = "meta_expressions_valid_.json", "meta_expressions_train_.json", "mask_dict.json"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def revos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("revos")
    write_revos(root)
    return root


@pytest.fixture
def copy(revos: Path, tmp_path: Path) -> Path:
    return shutil.copytree(revos, tmp_path / "data")


def open_split(root: Path, split: str = "valid") -> VideoSet:
    return open_source(DataSourceConfig(source="revos", root=root, split=split))


def edit(name: str, change: Callable[[Any], object]) -> Spoil:
    def spoil(root: Path) -> None:
        content = json.loads((root / name).read_text())
        change(content)
        (root / name).write_text(json.dumps(content))

    return spoil


def expression(change: Callable[[Any], object], name: str = VALID, exp_id: str = "1") -> Spoil:
    return edit(name, lambda meta: [change(video["expressions"][exp_id]) for video in meta["videos"].values()])


def test_frames_sentences_kinds_and_masks_are_those_on_disk(revos: Path) -> None:
    first, second = open_split(revos, "train").videos()
    assert (first.video_id, second.video_id, first.size) == ("UVO/all/-a1", "TAO/b2", SIZE)
    assert first.files_digest() and first.missing_file(range(6)) is None and first.frame_names[1] == "00005"
    for video, number in ((first, 0), (second, 2)):
        square, disc = str(number), str(number + 1)
        assert [e.anno_ids for e in video.expressions] == [(square,), (disc,), (square, disc), ()]
        assert [e.kind for e in video.expressions] == ["referring", "reasoning", "reasoning", "no_target"]
        truth = np.stack([index_map(i) for i in range(6)])
        for anno_ids, objects in (((square,), [1]), ((disc,), [3]), ((square, disc), [1, 3]), ((), [])):
            assert np.array_equal(video.mask(anno_ids, [5, 0, 1, 0]), np.isin(truth[[5, 0, 1, 0]], objects))


def test_a_sentence_of_type_2_names_nothing_and_no_other_does(revos: Path) -> None:
    (video,) = open_split(revos).videos()
    assert [names_nothing(video, e) for e in video.expressions] == [e.kind == "no_target" for e in video.expressions]


def test_splits_share_frames_and_masks_and_each_has_its_own_videos(revos: Path) -> None:
    assert RevosSource.split_ids(revos, "train") == {"UVO/all/-a1", "TAO/b2"}
    assert RevosSource.split_ids(revos, "valid") == {"LVVIS/c3"} and RevosSource.split_ids(revos, "test") is None
    assert RevosSource.evaluation_splits(revos, split="train") == ["valid"]
    assert family_of(DataSourceConfig(source="revos", root=revos)) == "revos"
    train, valid = open_split(revos, "train").identity(), open_split(revos).identity()
    assert train["masks"] == valid["masks"] and train["expressions"] != valid["expressions"]


@pytest.mark.parametrize("exp_id", ["0", "3"])
def test_a_list_that_is_not_scored_needs_no_kinds(copy: Path, exp_id: str) -> None:
    for name in (TRAIN, VALID):
        expression(lambda entry: entry.pop("type_id"), name, exp_id)(copy)
    kinds = [e.kind for e in open_split(copy, "train").videos()[0].expressions]
    assert kinds[int(exp_id)] == "" and sum(map(bool, kinds)) == 3
    with pytest.raises(DataError, match=rf"LVVIS/c3\.expressions\.{exp_id} has no field 'type_id'"):
        open_split(copy)


SPOILED: list[tuple[Spoil, str]] = [
    (lambda root: (root / VALID).unlink(), r"valid_\.json is missing \(data.root, data.split\); .* has train$"),
    (lambda root: shutil.rmtree(root), r"valid_\.json is missing .* has no such list"),
    (lambda root: (root / MASKS).unlink(), r"mask_dict\.json is missing"),
    (lambda root: shutil.rmtree(root / "JPEGImages"), "JPEGImages is missing"),
    (lambda root: (root / VALID).write_text("{"), r"valid_\.json: no valid JSON"),
    (edit(VALID, lambda meta: meta["videos"]["LVVIS/c3"].pop("frames")), r"videos\.LVVIS/c3 has no field 'frames'"),
    (edit(VALID, lambda meta: meta["videos"].update({"../x": meta["videos"]["LVVIS/c3"]})), "expected a name below"),
    (edit(MASKS, lambda masks: masks["5"].pop()), "annotation 5 has 5 masks, its video 6 frames"),
    (expression(lambda entry: entry.update(anno_id=[99])), r"1\.anno_id names 99, which .*mask_dict\.json"),
    (expression(lambda entry: entry.update(exp=" ")), r"1\.exp is ' ': an empty sentence"),
    (expression(lambda entry: entry.update(type_id=2)), r"expressions\.1\.type_id is 2, .* anno_id names 5"),
    *[
        (expression(lambda entry, value=value: entry.update(type_id=value)), r"1\.type_id is .*expected one of 0, 1, 2")
        for value in (3, -1, "0", True, 1.0, None, [0])
    ],
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), SPOILED)
def test_a_spoiled_dataset_is_refused_in_one_line(copy: Path, spoil: Spoil, said: str) -> None:
    spoil(copy)
    with pytest.raises(DataError, match=said) as raised:
        open_split(copy)
    assert "\n" not in str(raised.value) and str(copy) in str(raised.value)


def test_a_kind_changes_no_byte_of_a_cache(revos: Path, make_config: Any, tmp_path: Path) -> None:
    """Neither shards nor fingerprint change, so builds from before sentences had kinds can continue."""
    written = []
    for name, kind in (("with", RevosSource.expression), ("without", super(RevosSource, RevosSource).expression)):
        data = CacheSourceConfig(source="revos", root=revos)
        config = make_config(tmp_path / name, cache={"views": 1}).model_copy(update={"data": data})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RevosSource, "expression", kind)
            build(config)
        report = verify(config.out)
        assert report.ok and report.records == 4  # 6 frames are two clips of 5
        shards = {path.name: path.read_bytes() for path in sorted(config.out.rglob("*.tar"))}
        plan = json.loads((config.out / "plan/plan.json").read_text())
        written.append((shards, plan["fingerprint"]))
    assert written[0] == written[1] and written[0][0]
