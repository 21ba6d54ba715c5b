"""Laws of a cache of several datasets: they stay apart, and a list of one is the same as that one without a name."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from layouts import write_refcoco

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.clip.clips import clips_of
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.plan.fingerprint import fingerprint
from flowmask.data_pipeline.read.epoch_plan import EpochPlan
from flowmask.data_pipeline.read.loader import Loader
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.show.inspect_examples import CONFIG, ExampleDecoder
from flowmask.data_pipeline.sources import open_source
from flowmask.launch.config import validate
from flowmask.models.errors import CacheError, ConfigError


@pytest.fixture(scope="module")
def roots(mevis, tmp_path_factory) -> dict[str, Path]:
    """MeViS, a copy with the same ids but other pictures and sentences, and RefCOCO."""
    base = tmp_path_factory.mktemp("datasets")
    other = shutil.copytree(mevis, base / "other")
    for frame in sorted((other / "train/JPEGImages").rglob("*.jpg")):
        frame.write_bytes((mevis / "train/JPEGImages/dogs/00000.jpg").read_bytes())
    meta = other / "train/meta_expressions.json"
    meta.write_text(meta.read_text().replace("everything", "something"))
    (base / "coco").mkdir()
    write_refcoco(base / "coco")
    return {"mevis": mevis, "other": other, "refcoco": base / "coco"}


@pytest.fixture(scope="module")
def entries(roots):
    return [
        {"source": "mevis", "root": roots["mevis"], "split": "train"},
        {"source": "mevis", "root": roots["other"], "split": "train", "name": "other"},
        {"source": "refcoco", "root": roots["refcoco"], "split": "refcoco/unc/train", "frames": 1},
    ]


@pytest.fixture(scope="module")
def config_of(make_config):
    def make(out: Path, data) -> CacheBuildConfig:
        return CacheBuildConfig.model_validate({**make_config(out).model_dump(), "data": data})

    return make


@pytest.fixture(scope="module")
def mixed(config_of, entries, tmp_path_factory) -> Path:
    config = config_of(tmp_path_factory.mktemp("mixed") / "cache", entries)
    build(config)
    (config.out / CONFIG).write_text(json.dumps(config.model_dump(mode="json")))
    return config.out


def records(folder: Path):
    reader = CacheReader(folder)
    found = {}
    for example in range(reader.manifest.examples):
        record = reader.record(example)
        found[record["clip"], record["view"]] = record
    reader.close()
    return list(found.values())


def test_videos_of_one_id_stay_apart_and_each_record_names_its_dataset(mixed):
    assert verify(mixed).ok
    clips = Counter((r["source"], r["video_id"]) for r in records(mixed) if r["view"] == 0)
    assert {source for source, _ in clips} == {"mevis", "other", "refcoco"}
    assert clips["mevis", "cars"] == clips["other", "cars"] == 3  # twelve frames, one anchor in five
    texts = {
        source: {e["text"] for r in records(mixed) if r["source"] == source for e in r["expressions"]}
        for source in ("mevis", "other")
    }
    assert "everything that moves" in texts["mevis"] and "something that moves" in texts["other"]
    assert not any("something" in text for text in texts["mevis"])


def test_the_clips_of_a_dataset_have_its_own_number_of_frames_and_buckets_hold_one_shape(mixed):
    assert {(r["source"], len(r["frame_ids"])) for r in records(mixed)} == {("mevis", 5), ("other", 5), ("refcoco", 1)}
    reader = CacheReader(mixed)
    plan = EpochPlan(reader.buckets, global_batch=4, seed=0)
    seen: Counter[tuple[int, int]] = Counter()
    with Loader(reader, plan, rank=0, world_size=1, micro_batch=4, needs={"video_mean"}, text_tokens=256) as steps:
        for _ in range(plan.first_step(4)):
            (batch,) = next(steps)
            assert batch.video_mean.shape[2:] == reader.bucket_of(int(batch.example_ids[0])).latent_shape
            seen.update(zip(batch.example_ids.tolist(), batch.epochs.tolist(), strict=True))
    assert {bucket.frames for bucket in reader.manifest.buckets} == {1, 5}
    assert set(seen.values()) == {1}
    whole = [i for i in range(reader.manifest.examples) if int(reader.index[i]["view"]) == 0]
    late = sum((i, 0) not in seen for i in whole)
    assert late == 0, "an epoch that is over has fed every example of its view"
    reader.close()


def test_draws_are_of_dataset_and_id_so_equal_ids_are_drawn_apart_and_order_plays_no_part(config_of, entries, tmp_path):
    def drawn(data):
        config = config_of(tmp_path, data)
        return {
            (video.source, video.video_id, view): [
                (clip.frame_ids, clip.geometry)
                for clip in clips_of(
                    video, index=0, first_number=0, view=view, clip=config.clip_of(video.source), cache=config.cache
                )
            ]
            for video in open_source(config.sources).videos()
            for view in range(4)
        }

    forwards, backwards, alone = drawn(entries), drawn(entries[::-1]), drawn(entries[0])
    assert forwards == backwards
    assert all(forwards["mevis", v, view] != forwards["other", v, view] for _, v, view in alone if v == "cars")
    assert {source for source, _, _ in alone} == {""} and len(alone) == 12


def test_a_list_of_one_dataset_is_that_dataset(cache, config_of, entries, tmp_path):
    config = config_of(tmp_path / "cache", entries[:1])
    build(config)
    ours, theirs = CacheReader(tmp_path / "cache").manifest, CacheReader(cache).manifest
    assert ours.fingerprint == theirs.fingerprint
    assert [shard.sha256 for shard in ours.shards] == [shard.sha256 for shard in theirs.shards]


def test_the_fingerprint_of_one_dataset_has_the_fields_it_always_had(cache):
    """One more field, with any default, would refuse every older cache."""
    fields = CacheReader(cache).manifest.fingerprint.fields
    clip = (
        "sampling frames short_side long_side size_multiple augment crop_probability crop_short_sides crop_min "
        "crop_max flip_probability"
    )
    kept = "clips_per_shard views seed dtype encoder_dtype drop_empty_masks lowercase pixel_norm batch_clips"
    assert set(fields) == {
        *("format", "text.limits", "model.vae", "model.text_encoder", "model.tokenizer"),
        *("data.expressions", "data.masks", "data.frames"),
        *(f"clip.{name}" for name in clip.split()),
        *(f"cache.{name}" for name in kept.split()),
    }


def test_a_change_of_one_dataset_is_refused_by_its_name(mixed, config_of, entries, roots, tmp_path):
    changed = shutil.copytree(roots["other"], tmp_path / "changed")
    meta = changed / "train/meta_expressions.json"
    meta.write_text(meta.read_text().replace("something", "anything"))
    data = [entries[0], {**entries[1], "root": changed}, entries[2]]
    with pytest.raises(CacheError, match=r"\(data\.expressions\.other: [^;]*\)") as raised:
        build(config_of(mixed, data))
    assert "\n" not in str(raised.value)
    with pytest.raises(CacheError, match=r"data\.sources"):
        build(config_of(mixed, [entries[1], entries[0], entries[2]]))
    with pytest.raises(CacheError, match=r"clip\.frames\.refcoco: 1 there, None asked for"):
        build(config_of(mixed, [*entries[:2], {**entries[2], "frames": None}]))


def test_hashes_of_text_video_and_masks_follow_what_changed_in_any_dataset(config_of, entries, roots, tmp_path):
    def parts(data):
        config = config_of(tmp_path, data)
        memo = tmp_path / "weights.json"
        return fingerprint(config, open_source(config.sources), memo=memo)

    changed = shutil.copytree(roots["other"], tmp_path / "changed")
    data = [entries[0], {**entries[1], "root": changed}, entries[2]]
    before = parts(data)
    masks = changed / "train/mask_dict.json"
    masks.write_text(masks.read_text() + " ")
    after = parts(data)
    assert (after.text, after.video) == (before.text, before.video) and after.masks != before.masks
    frame = changed / "train/JPEGImages/cars/00000.jpg"
    frame.write_bytes(frame.read_bytes() + b"\0")
    assert parts(data).video != after.video and parts(data).text == before.text


def test_inspect_shows_the_originals_of_the_right_dataset(mixed, roots):
    reader = CacheReader(mixed)
    decoder = ExampleDecoder(reader)
    assert not decoder.why_no_originals
    by_source = {reader.record(i)["source"]: i for i in range(reader.manifest.examples)}
    for source, example_id in by_source.items():
        example = decoder.decode(example_id)
        record = example.record
        (video,) = (v for v in decoder._videos.values() if (v.source, v.video_id) == (source, record["video_id"]))
        assert example.originals is not None and example.originals.shape == example.frames.shape
        assert str(roots[source]) in str(video.frame_path(0))
    reader.close()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "data is .*at least 1 item"),
        ([{"source": "mevis"}], r"key data\.0\.root is missing"),
        ({"source": "mevis"}, r"key data\.root is missing"),
        ({"root": "x", "rot": 1}, r"unknown key data\.rot; did you mean data\.root"),
        ([{"root": "x"}, {"root": "y", "splt": 1}], r"unknown key data\.1\.splt"),
        ([{"root": "x"}, {"root": "y"}], "two datasets called 'mevis'; give each a different `name`"),
        ([{"root": "x", "frames": 6}], r"frames is 6; it must be 4k \+ 1"),
        ([{"root": "x", "name": "a/b"}], r"data\.0\.name is 'a/b'"),
        (7, "data is 7"),
    ],
)
def test_a_list_of_datasets_that_cannot_be_is_one_line_with_the_key(data, said):
    with pytest.raises(ConfigError, match=said) as raised:
        validate({"out": "o", "model": {"wan": "w"}, "data": data}, CacheBuildConfig, origin="c.yaml")
    assert "\n" not in str(raised.value)
