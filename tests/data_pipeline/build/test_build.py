"""Laws of the build with real processes: the same bytes after any interruption and with any number of workers."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from build_workers import contents, finish, start
from forks import Forked
from trials import SEED, TRIALS

from flowmask.data_pipeline.build.build import Build, build
from flowmask.data_pipeline.build.progress import BuildProgress
from flowmask.data_pipeline.build.sentences import encode_sentences
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.plan.units import read_plan
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.models.errors import CacheError, DataError
from flowmask.models.text import clean
from flowmask.models.weights.wan import WanFolder


def kill_after(worker: Forked, lines: int) -> None:
    """SIGKILL a worker after it has reported its progress `lines` times."""
    worker.follow(lines)
    worker.kill()


def test_two_workers_build_the_same_bytes_as_one(cache, make_config, tmp_path):
    config = make_config(tmp_path / "other place")
    workers = [start(config, worker=i, workers=2) for i in range(2)]
    for worker in workers:
        finish(worker)
    assert contents(config.out) == contents(cache)


def interrupt_and_compare(config: CacheBuildConfig, *, kills: int, seed: int, whole: Path) -> None:
    draw = random.Random(seed)
    for _ in range(kills):
        kill_after(start(config), draw.randint(1, 16))
    build(config)
    assert contents(config.out) == contents(whole)


def test_a_build_killed_at_random_points_ends_with_the_same_bytes(cache, make_config, tmp_path):
    interrupt_and_compare(make_config(tmp_path / "cache"), kills=3, seed=1, whole=cache)


@pytest.mark.long
def test_many_builds_killed_at_random_points_end_with_the_same_bytes(cache, make_config, tmp_path):
    for trial in range(TRIALS):
        seed = SEED + trial
        interrupt_and_compare(make_config(tmp_path / f"{trial}"), kills=4, seed=seed, whole=cache)


def test_a_worker_that_dies_leaves_its_unit_to_the_others(cache, make_config, tmp_path):
    config = make_config(tmp_path / "cache")
    victim, other = (start(config, worker=i, workers=2) for i in range(2))
    kill_after(victim, 6)
    finish(other)
    assert contents(config.out) == contents(cache)


def test_leftovers_of_a_killed_writer_vanish(cache, make_config, tmp_path):
    config = make_config(tmp_path / "cache")
    for left in ("shards/.tmp-000001.tar.0badcafe", "plan/.tmp-clips.jsonl.00", ".tmp-index.npy.00"):
        (config.out / left).parent.mkdir(parents=True, exist_ok=True)
        (config.out / left).write_bytes(b"half a file")
    build(config)
    assert contents(config.out) == contents(cache)


def test_a_shard_that_was_cut_before_the_end_of_the_build_is_made_again(cache, make_config, tmp_path):
    config = make_config(tmp_path / "cache")
    build(config)
    (config.out / "manifest.json").unlink()
    shard = config.out / "shards" / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    build(config)
    assert contents(config.out) == contents(cache)


@pytest.mark.parametrize("name", ["clips.jsonl", "texts.jsonl"])
def test_a_build_does_not_end_by_a_plan_that_has_changed_since_it_was_written(make_config, tmp_path, name):
    config = make_config(tmp_path / "cache")
    build(config)
    (config.out / "manifest.json").unlink()
    path = config.out / "plan" / name
    path.write_bytes(path.read_bytes().replace(b"the", b"tha", 1))  # a valid plan, except for its hash
    with pytest.raises(CacheError, match=rf"plan/{name}: changed since the build was planned.*delete {config.out} "):
        build(config)
    assert not (config.out / "manifest.json").exists()


def test_a_complete_cache_is_left_as_it_is_and_says_so(cache, make_config):
    before, told = contents(cache), []
    build(make_config(cache), on_progress=told.append)
    assert told[-1] == BuildProgress("complete", told[-1].total, told[-1].total)
    assert not {"text", "clips", "finalise"} & {progress.phase for progress in told}
    assert contents(cache) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cache": {"seed": 1}}, "cache.seed: 0 there, 1 asked for"),
        ({"clip": {"frames": 9}}, "clip.frames: 5 there, 9 asked for"),
    ],
)
def test_another_fingerprint_is_refused_with_the_field(cache, make_config, change, said):
    before = contents(cache)
    with pytest.raises(CacheError, match=said):
        build(make_config(cache, **change))
    assert contents(cache) == before


def test_other_weights_are_refused_also_for_a_build_that_has_not_finished(make_config, tmp_path):
    from flowmask.models.weights.tiny_wan import write_tiny_wan

    kill_after(start(make_config(tmp_path / "cache")), 4)
    write_tiny_wan(tmp_path / "wan", seed=1, random_vae=True)
    with pytest.raises(CacheError, match=r"model\.text_encoder.*model\.vae"):
        build(make_config(tmp_path / "cache", wan=tmp_path / "wan"))


def test_the_place_of_weights_and_dataset_does_not_shape_bytes(cache, make_config, mevis, tiny_wan, tmp_path):
    import shutil

    shutil.copytree(mevis, tmp_path / "data")
    shutil.copytree(tiny_wan, tmp_path / "weights")
    build(make_config(tmp_path / "cache", root=tmp_path / "data", wan=tmp_path / "weights"))
    assert contents(tmp_path / "cache") == contents(cache)


def test_the_manifest_holds_no_time_path_or_number_of_workers(cache):
    text = (cache / "manifest.json").read_text()
    assert str(cache) not in text and "worker" not in text and "time" not in text


def test_cached_equals_on_the_fly_to_the_bit(cache, make_config):
    """Every tensor from the reader equals the encoders' output for that clip and sentence."""
    config = make_config(cache)
    plan = read_plan(cache / "plan")
    on_the_fly = Build(config).clip_pass(plan)
    reader = CacheReader(cache)
    text_encoder = WanFolder(config.model.wan).text_encoder(torch.float32)
    checked = 0
    for unit in range(plan.clip_units):
        for encoded in on_the_fly.encode_unit(unit):
            for example in range(reader.manifest.examples):
                record = reader.record(example)
                if (record["clip"], record["view"]) != (encoded.clip.number, encoded.clip.view):
                    continue
                read = reader.read([example], needs=reader_needs(), text_tokens=256)
                expression = record["expressions"][int(reader.index[example]["expression"])]
                anno_ids = tuple(record["masks"][expression["mask"]]["anno_ids"])
                place = encoded.clip.masks.index(anno_ids)
                assert torch.equal(read["video_mean"][0], encoded.video_mean)
                assert torch.equal(read["video_logvar"][0], encoded.video_logvar)
                assert torch.equal(read["mask_mean"][0], encoded.mask_means[place])
                masks = [rle.decode(frame, size=tuple(frame["size"]), where="") for frame in encoded.mask_rles[place]]
                assert torch.equal(read["mask_pixels"][0], torch.from_numpy(np.stack(masks)))
                (texts,) = encode_sentences(text_encoder, [expression["text"]], dtype=torch.bfloat16, together=1)
                text = texts[256]
                assert torch.equal(read["text"][0, : len(text)], text)
                assert not read["text"][0, len(text) :].any()
                checked += 1
    assert checked == reader.manifest.examples > 20


def reader_needs() -> set[str]:
    return {"video_mean", "video_logvar", "mask_mean", "text", "mask_pixels"}


def test_each_distinct_sentence_is_encoded_once(cache, make_config, mevis):
    plan = read_plan(cache / "plan")
    texts = [text for unit in range(plan.text_units) for text in plan.unit_texts(unit)]
    assert len(set(texts)) == len(texts)
    assert "the red square on the left" in texts
    assert all(text == clean(text, lowercase=True) for text in texts)


def test_an_expression_whose_object_is_absent_from_a_clip_is_left_out_of_it(cache, make_config, tmp_path):
    manifest = CacheReader(cache).manifest
    assert manifest.dropped_empty_masks > 0
    build(make_config(tmp_path / "all", cache={"drop_empty_masks": False}))
    kept = CacheReader(tmp_path / "all").manifest
    assert kept.dropped_empty_masks == 0
    assert kept.examples > manifest.examples


def test_a_number_that_is_not_finite_stops_the_build_and_names_the_clip(make_config, tmp_path, monkeypatch):
    from flowmask.data_pipeline.build import encode

    def spoiled(vae, signed):
        mean = torch.full((len(signed), 16, 2, 4, 4), torch.nan)
        return mean, mean

    monkeypatch.setattr(encode, "encode_moments", spoiled)
    with pytest.raises(CacheError, match=r"clip 00000000_00 \(video birds.*not finite"):
        build(make_config(tmp_path / "cache"))
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda split: (split / "JPEGImages/cars/00010.jpg").unlink(), "00010.jpg: the file is missing"),
        (lambda split: (split / "JPEGImages/cars/00000.jpg").write_text("no image"), "00000.jpg: not a read"),
    ],
)
def test_a_bad_frame_stops_the_build_in_one_line_and_mending_it_lets_it_go_on(
    cache, make_config, mevis, tmp_path, spoil: Callable[[Path], None], said: str
):
    import shutil

    shutil.copytree(mevis, tmp_path / "data")
    spoil(tmp_path / "data" / "train")
    config = make_config(tmp_path / "cache", root=tmp_path / "data")
    with pytest.raises(DataError, match=said) as raised:
        build(config)
    assert "\n" not in str(raised.value)
    shutil.copytree(mevis, tmp_path / "data", dirs_exist_ok=True)
    build(config)
    assert contents(config.out) == contents(cache)


def test_an_unwritable_output_is_one_line(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot write") as raised:
        build(make_config(tmp_path / "file" / "cache"))
    assert "\n" not in str(raised.value)


def test_a_full_disk_is_one_line_and_what_is_finished_stays(make_config, tmp_path, cache, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 16:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    config = make_config(tmp_path / "cache")
    with pytest.raises(CacheError, match="No space left on device"):
        build(config)
    assert not list(config.out.rglob(".tmp-*"))
    build(config)
    assert contents(config.out) == contents(cache)


def test_a_dataset_without_masks_cannot_be_cached(make_config, mevis, tmp_path):
    import shutil

    shutil.copytree(mevis, tmp_path / "data")
    (tmp_path / "data/train/mask_dict.json").unlink()
    with pytest.raises(DataError, match="birds has no masks"):
        build(make_config(tmp_path / "cache", root=tmp_path / "data"))


def test_the_plan_of_a_view_does_not_change_when_views_are_added(cache, make_config, tmp_path):
    build(make_config(tmp_path / "one", cache={"views": 1}))
    one = read_plan(tmp_path / "one" / "plan")
    two = read_plan(cache / "plan")
    for unit in range(one.clip_units):
        assert [clip for clip, _ in one.unit_clips(unit)] == [clip for clip, _ in two.unit_clips(unit)]
    record = json.loads((tmp_path / "one" / "shards" / "000000.json").read_text())
    assert record["sha256"] == json.loads((cache / "shards" / "000000.json").read_text())["sha256"]
