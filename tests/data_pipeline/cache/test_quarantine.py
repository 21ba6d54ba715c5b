"""Laws of the quarantine: unreadable clips are named and left out, equally for any number of workers, up to a limit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_workers import contents, finish, start
from PIL import Image

from flowmask.data_pipeline.build.build import Build, build
from flowmask.data_pipeline.cache import quarantine
from flowmask.data_pipeline.cache.quarantine import Line, Quarantine, line
from flowmask.data_pipeline.cache.shards import sidecar_name
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.models.errors import CacheError, DataError

LIMIT = {"max_quarantined_fraction": 0.7}


@pytest.fixture
def copy(mevis: Path, tmp_path: Path) -> Path:
    shutil.copytree(mevis, tmp_path / "data")
    return tmp_path / "data"


def edit_masks(root: Path, anno_id: str, value: Any) -> None:
    path = root / "train/mask_dict.json"
    masks = json.loads(path.read_text())
    masks[anno_id] = [value] * len(masks[anno_id])
    path.write_text(json.dumps(masks))


def frames(root: Path, video: str) -> list[Path]:
    return sorted((root / "train/JPEGImages" / video).iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:400])


def lines_of(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (cache / "quarantine.jsonl").read_text().splitlines()]


BAD = {
    "missing": (lambda root: [path.unlink() for path in frames(root, "cars")[1:]], "the frame is missing"),
    "cut": (lambda root: [cut(path) for path in frames(root, "cars")[1:]], "truncated"),
    "another size": (
        lambda root: [Image.new("RGB", (16, 16)).save(path) for path in frames(root, "cars")[1:]],
        "16x16 px",
    ),
    "mask of another size": (lambda root: edit_masks(root, "2", rle.encode(np.ones((8, 8), bool))), "RLE is 8x8"),
    "no run lengths": (lambda root: edit_masks(root, "2", {"size": [48, 64], "counts": "~~"}), "malformed RLE"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_named_with_its_reason_and_the_rest_is_cached(copy, cache, make_config, kind):
    spoil, reason = BAD[kind]
    spoil(copy)
    config = make_config(copy.parent / "cache", root=copy, cache=LIMIT)
    build(config)
    found = lines_of(config.out)
    assert found and all(entry["video"] == "cars" and reason in entry["reason"] for entry in found)
    assert all((copy / entry["file"]).name and not entry["file"].startswith("/") for entry in found)
    manifest, whole = CacheReader(config.out).manifest, CacheReader(cache).manifest
    assert manifest.quarantined_clips == len(found) == whole.clips - manifest.clips
    keys = [entry["clip"] for entry in found]
    assert keys == sorted(keys, key=lambda key: (key[-2:], key))
    assert not (config.out / "work").exists()


def test_a_video_without_a_readable_header_is_quarantined_as_a_whole(copy, make_config):
    frames(copy, "dogs")[0].write_text("no image")
    config = make_config(copy.parent / "cache", root=copy, cache=LIMIT)
    build(config)
    (entry,) = lines_of(config.out)
    assert (entry["video"], entry["clip"]) == ("dogs", None)
    assert entry["file"] == "train/JPEGImages/dogs/00000.jpg"
    assert CacheReader(config.out).manifest.unreadable_videos == 1
    said = quarantine.summary(config.out)
    assert said.startswith("1 video cannot be read and is left out; the first: train/JPEGImages/dogs/00000.jpg: ")


def test_a_video_without_a_readable_header_counts_as_a_clip_of_each_view(copy, make_config):
    frames(copy, "dogs")[0].write_text("no image")
    share = make_config(copy.parent / "cache", root=copy, cache={"views": 2, "max_quarantined_fraction": 0.0})
    with pytest.raises(DataError, match=r"2 of \d+ clips cannot be read"):
        build(share)


def test_a_cache_with_a_quarantine_has_the_same_bytes_whatever_the_workers_and_the_place(copy, make_config):
    cut(frames(copy, "cars")[6])
    frames(copy, "dogs")[0].unlink()
    one = make_config(copy.parent / "one", root=copy, cache=LIMIT)
    build(one)
    assert len(lines_of(one.out)) >= 2
    shutil.copytree(copy, copy.parent / "elsewhere")
    two = make_config(copy.parent / "two", root=copy.parent / "elsewhere", cache=LIMIT)
    workers = [start(two, worker=i, workers=2) for i in range(2)]
    for worker in workers:
        finish(worker)
    assert contents(two.out) == contents(one.out)


def test_above_the_limit_the_build_stops_in_one_line_and_tries_again_what_was_mended(copy, cache, make_config):
    path = frames(copy, "cars")[6]
    good = path.read_bytes()
    path.write_bytes(bytes(len(good)))  # the same size: the fingerprint can't tell
    config = make_config(copy.parent / "cache", root=copy, cache={"max_quarantined_fraction": 0.0})
    with pytest.raises(DataError, match=r"00030\.jpg: not a readable image.*max_quarantined_fraction 0;") as raised:
        build(config)
    assert "\n" not in str(raised.value)
    assert not (config.out / "manifest.json").exists()
    path.write_bytes(good)
    build(config)
    assert contents(config.out) == contents(cache)
    assert lines_of(config.out) == []


def test_units_that_finished_before_the_limit_was_passed_are_tried_again_too(copy, cache, make_config):
    spoilt = {path: path.read_bytes() for path in frames(copy, "cars")[1:]}
    for path, good in spoilt.items():
        path.write_bytes(bytes(len(good)))
    config = make_config(copy.parent / "cache", root=copy, cache={"max_quarantined_fraction": 0.3})
    with pytest.raises(DataError, match=r"of 12 clips cannot be read"):
        build(config)
    for path, good in spoilt.items():
        path.write_bytes(good)
    build(config)
    assert contents(config.out) == contents(cache)


def test_missing_files_above_the_limit_are_refused_before_anything_is_planned(copy, make_config):
    for path in frames(copy, "cars")[1:]:
        path.unlink()
    config = make_config(copy.parent / "cache", root=copy)
    with pytest.raises(DataError, match=r"\.jpg: the file is missing.*of 12 clips cannot be read"):
        build(config)
    assert not (config.out / "plan/plan.json").exists()


def test_a_mended_file_of_another_size_is_refused_with_the_field(copy, make_config, mevis):
    cut(frames(copy, "cars")[6])
    config = make_config(copy.parent / "cache", root=copy, cache=LIMIT)
    build(config)
    shutil.copytree(mevis, copy, dirs_exist_ok=True)
    with pytest.raises(CacheError, match=r"data\.frames"):
        build(config)


def test_the_quarantine_of_a_running_build_is_on_the_disk(copy, make_config, monkeypatch):
    cut(frames(copy, "birds")[3])
    config = make_config(copy.parent / "cache", root=copy, cache=LIMIT)
    seen = []
    told = lambda progress: seen.append(len(list((config.out / "work/quarantine").glob("*.jsonl"))))  # noqa: E731
    Build(config, on_progress=told).run()
    assert max(seen) >= 1


@pytest.mark.parametrize("number", [12, 24, 28, 116])  # ENOMEM, EMFILE, ENOSPC, ESTALE
def test_what_is_not_the_input_s_fault_is_an_error(number, tmp_path):
    error = DataError("a.jpg: not a readable image")
    error.__cause__ = OSError(number, "of the machine")
    with pytest.raises(DataError, match="not a readable image"):
        line(error, video_id="v", clip="c", roots=[tmp_path])


def test_a_dataset_that_vanished_is_an_error(tmp_path):
    with pytest.raises(DataError, match="vanished"):
        line(DataError("a.jpg: missing"), video_id="v", clip="c", roots=[tmp_path / "gone"])


def test_each_finished_unit_is_read_once_however_many_clips_are_lost_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units, reads = 20, list[Path]()

    def counted(path: Path) -> list[Line]:
        reads.append(path)
        return real(path)

    real = quarantine.read
    monkeypatch.setattr(quarantine, "read", counted)
    lost = [{"video": "v", "clip": "c", "file": "f", "reason": "r"}]
    ours, theirs = (Quarantine(tmp_path, clips=100, videos=0, fraction=0.5, shards=tmp_path) for _ in range(2))
    for unit in range(units):
        worker = (ours, theirs)[unit % 2]
        worker.add(unit, lost)
        worker.add(unit, lost * 2)
        (tmp_path / sidecar_name(unit)).touch()
    assert len(reads) <= 2 * units
    assert len(list((tmp_path / "work/quarantine").iterdir())) == units
    with pytest.raises(DataError, match="51 of 100 clips cannot be read"):
        ours.add(units, lost * 11)
