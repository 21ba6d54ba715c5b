"""Laws of the leak check: no evaluation video is trained on without permission, and the manifest records it."""

import json
import pickle
import shutil

import pytest
from layouts import write_davis, write_refcoco, write_youtube

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.cache.manifest import read_manifest
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.plan.leaks import refuse_evaluation, without_leaks
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.sources import open_source
from flowmask.models.errors import CacheError, ConfigError, DataError


def guarded(source, root, split, *, leaks="refuse", held_out=(), **more):
    config = CacheBuildConfig.model_validate(
        {
            "out": "cache",
            "model": {"wan": "wan"},
            "data": {"source": source, "root": root, "split": split, **more},
            "cache": {"leaks": leaks, "held_out": list(held_out)},
        }
    )
    return without_leaks(open_source(config.data), config)


def ids(source):
    return [video.video_id for video in source.videos()]


@pytest.fixture
def mevis_with_valid(mevis, tmp_path):
    """MeViS whose `birds` is also in valid_u, and a `valid` of another video without masks or frames."""
    root = shutil.copytree(mevis, tmp_path / "mevis")
    meta = json.loads((root / "train" / "meta_expressions.json").read_text())
    for split, video_ids in (("valid_u", ["birds"]), ("valid", ["zebras"])):
        (root / split).mkdir()
        entries = {video_id: meta["videos"].get(video_id, {}) for video_id in video_ids}
        (root / split / "meta_expressions.json").write_text(json.dumps({"videos": entries}))
    (root / "test").mkdir()  # an empty folder
    return root


def test_a_video_of_a_sibling_evaluation_split_is_refused_in_one_line(mevis_with_valid):
    with pytest.raises(DataError, match=r"1 of 3 videos .* birds \(valid_u\).*cache\.leaks=drop") as refusal:
        guarded("mevis", mevis_with_valid, "train")
    assert "\n" not in str(refusal.value)


def test_dropped_videos_are_out_of_the_plan_and_counted_in_the_manifest(mevis_with_valid, make_config, tmp_path, cache):
    config = make_config(tmp_path / "cache", root=mevis_with_valid, cache={"leaks": "drop"})
    build(config)
    reader = CacheReader(config.out)
    kept = {reader.record(i)["video_id"] for i in range(reader.manifest.examples)}
    assert kept == {"cars", "dogs"}
    leaks = reader.manifest.leaks
    assert (leaks.dropped_videos, leaks.checked, leaks.unreadable) == (1, ["valid", "valid_u"], ["test"])
    assert reader.manifest.role == "train" and verify(config.out).ok
    fields = reader.manifest.fingerprint.fields
    theirs = read_manifest(cache).fingerprint.fields
    assert fields["cache.leaks"] == "drop" and fields["data.frames"] != theirs["data.frames"]


def test_nothing_leaks_where_no_video_is_shared_and_what_was_checked_is_said(mevis_with_valid):
    (mevis_with_valid / "valid_u" / "meta_expressions.json").write_text('{"videos": {"owls": {}}}')
    source = guarded("mevis", mevis_with_valid, "train")
    assert ids(source) == ["birds", "cars", "dogs"]
    assert source.facts["leaks"]["checked"] == ["valid", "valid_u"]


def test_a_cache_of_an_evaluation_split_is_allowed_marked_and_not_trained_on(mevis, make_config, tmp_path):
    root = tmp_path / "mevis"
    shutil.copytree(mevis / "train", root / "valid_u")
    config = make_config(tmp_path / "cache", root=root)
    config = config.model_copy(update={"data": config.sources[0].model_copy(update={"split": "valid_u"})})
    build(config)
    manifest = read_manifest(config.out)
    assert manifest.role == "evaluation" and verify(config.out).ok
    with pytest.raises(CacheError, match="which training must not use"):
        refuse_evaluation([manifest], where=config.out)
    assert guarded("mevis", root, "valid_u", leaks="allow").facts["role"] == "train"


def test_an_evaluation_split_mixed_into_a_training_cache_leaks(mevis_with_valid):
    shutil.rmtree(mevis_with_valid / "valid_u")
    shutil.copytree(mevis_with_valid / "train", mevis_with_valid / "valid_u")
    data = [
        {"source": "mevis", "root": mevis_with_valid, "split": split, "name": split} for split in ("train", "valid_u")
    ]
    config = CacheBuildConfig.model_validate({"out": "cache", "model": {"wan": "wan"}, "data": data})
    with pytest.raises(DataError, match="6 of 6 videos"):
        without_leaks(open_source(config.data), config)


@pytest.mark.parametrize(("source", "write"), [("ref_youtube_vos", write_youtube), ("ref_davis17", write_davis)])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_lists_of_ref_youtube_vos_and_ref_davis17_are_looked_into(tmp_path, source, write, split):
    write(tmp_path)
    if not (tmp_path / "train").exists():  # the fixture of Ref-DAVIS17 writes the other split
        for folder in (tmp_path, tmp_path / "meta_expressions"):
            (folder / "valid").rename(folder / "train")
    first, *_ = ids(guarded(source, tmp_path, "train"))
    listed = tmp_path / "meta_expressions" / split / "meta_expressions.json"
    listed.parent.mkdir(exist_ok=True)
    listed.write_text(json.dumps({"videos": {first: {}}}))
    with pytest.raises(DataError, match=rf"{first} \({split}\)"):
        guarded(source, tmp_path, "train")
    if source == "ref_youtube_vos":  # the other fixture has only one video
        assert first not in ids(guarded(source, tmp_path, "train", leaks="drop"))


def test_videos_look_into_the_lists_beside_them(tmp_path):
    for name, listed in (("train", ["a.mp4", "b.mp4"]), ("valid", ["elsewhere/b.avi"])):
        lines = [{"video": video, "expressions": [{"text": "a dog"}]} for video in listed]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"b \(valid\)"):
        guarded("videos", tmp_path, "train")
    assert ids(guarded("videos", tmp_path, "train", leaks="drop")) == ["a"]
    assert guarded("videos", tmp_path / "valid.jsonl", "train").facts["role"] == "evaluation"


@pytest.mark.parametrize("form", ["refcoco/train", "refcoco/unc/train"])
@pytest.mark.parametrize("where", ["refcocog/refs(umd).p", "refcoco+/instances_refcoco+_testA.json"])
def test_a_coco_image_of_any_sets_evaluation_split_is_found(tmp_path, form, where):
    write_refcoco(tmp_path)
    first = ids(guarded("refcoco", tmp_path, form))[0]
    path, image_id = tmp_path / where, int(first.removeprefix("coco_"))
    path.parent.mkdir()
    if path.suffix == ".p":
        refs = [{"image_id": image_id, "split": "test"}, {"image_id": 98304, "split": "train"}]
        path.write_bytes(pickle.dumps(refs))
    else:
        path.write_text(json.dumps({"images": [{"id": 1, "original_id": image_id, "file_name": "x.jpg"}]}))
    with pytest.raises(DataError, match=rf"1 of 2 videos .*{first} \(refcoco"):
        guarded("refcoco", tmp_path, form)
    assert ids(guarded("refcoco", tmp_path, form, leaks="drop")) == ["coco_000000098304"]


def test_of_several_partitions_of_a_set_the_reported_and_the_own_one_count(tmp_path):
    write_refcoco(tmp_path)
    first = ids(guarded("refcoco", tmp_path, "refcoco/unc/train"))[0]
    other = [{"image_id": int(first.removeprefix("coco_")), "split": "val"}]
    (tmp_path / "refcoco" / "refs(google).p").write_bytes(pickle.dumps(other))
    assert first in ids(guarded("refcoco", tmp_path, "refcoco/unc/train"))
    held = [{"source": "refcoco", "root": tmp_path, "split": "refcoco/google/val"}]
    with pytest.raises(DataError, match=first):
        guarded("refcoco", tmp_path, "refcoco/unc/train", held_out=held)


def test_more_splits_are_held_out_by_config_and_must_be_there(mevis, mevis_with_valid):
    held = {"source": "mevis", "root": mevis_with_valid, "split": "valid_u"}
    with pytest.raises(DataError, match=r"birds \(mevis:valid_u\)"):
        guarded("mevis", mevis, "train", held_out=[held])
    assert ids(guarded("mevis", mevis, "train", held_out=[held], leaks="drop")) == ["cars", "dogs"]
    with pytest.raises(DataError, match="no such split"):
        guarded("mevis", mevis, "train", held_out=[{**held, "split": "valid_x"}])
    with pytest.raises(ConfigError, match=r"mewis.*known"):
        guarded("mevis", mevis, "train", held_out=[{**held, "source": "mewis"}])


def test_a_training_set_that_leaks_as_a_whole_is_refused_even_where_leaks_are_dropped(mevis, tmp_path):
    root = shutil.copytree(mevis, tmp_path / "mevis")
    shutil.copytree(root / "train", root / "valid")
    with pytest.raises(DataError, match="nothing would be left"):
        guarded("mevis", root, "train", leaks="drop")
    assert len(ids(guarded("mevis", root, "train", leaks="allow"))) == 3


def test_a_damaged_list_of_an_evaluation_split_is_one_line(mevis_with_valid):
    (mevis_with_valid / "valid" / "meta_expressions.json").write_text("{")
    with pytest.raises(DataError, match=r"valid/meta_expressions\.json"):
        guarded("mevis", mevis_with_valid, "train")
