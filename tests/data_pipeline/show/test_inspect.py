"""Laws of `cache inspect`: the page shows the cache's numbers and latents, and needs no other file."""

import json
import re
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.clip.pixels import from_signed, to_signed
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.plan import units
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.show import inspect_cache
from flowmask.data_pipeline.show.inspect_cache import count
from flowmask.data_pipeline.show.inspect_examples import ExampleDecoder
from flowmask.data_pipeline.show.inspect_page import _columns, inspect
from flowmask.data_pipeline.sources import open_source
from flowmask.models.errors import CacheError, ConfigError, WeightsError


@pytest.fixture(scope="module")
def page(cache, tiny_wan, tmp_path_factory):
    """The page of the shared cache, which has no config.yaml, like a cache of another program."""
    out = tmp_path_factory.mktemp("page") / "below" / "cache.html"
    inspect(cache, out=out, examples=2, seed=1, wan=tiny_wan)
    assert [file.name for file in out.parent.iterdir()] == ["cache.html"]
    return out.read_text()


@pytest.fixture(scope="module")
def configured(cache, make_config, tmp_path_factory):
    """A copy of the cache with the config of its build."""
    copy = shutil.copytree(cache, tmp_path_factory.mktemp("configured") / "cache")
    config = make_config(copy).model_dump(mode="json") | {"launch": {"nodes": 1}}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    return copy


def stored(cache):
    """(JSON, tensors, bytes of the JSON) of every record, read from the tars alone."""
    for path in sorted((cache / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            contents = [tar.extractfile(member).read() for member in tar]
        for meta, tensors in zip(contents[::2], contents[1::2], strict=True):
            yield json.loads(meta), load(tensors), len(meta)


def histogram(values):
    return np.bincount(list(values)).tolist()


def test_every_number_equals_what_the_shards_hold(cache, page):
    records = list(stored(cache))
    examples = [(meta, tensors, e) for meta, tensors, _ in records for e in meta["expressions"]]
    facts = count(CacheReader(cache))
    for kind, prefix in (("video", "video."), ("masks", "mask."), ("text", "text.")):
        tensors = [t for _, held, _ in records for name, t in held.items() if name.startswith(prefix)]
        assert facts.bytes_by_kind[kind] == sum(t.nbytes for t in tensors), kind
    assert facts.bytes_by_kind["json"] == sum(length for *_, length in records)
    size = sum(path.stat().st_size for path in (cache / "shards").glob("*.tar"))
    assert sum(facts.bytes_by_kind.values()) == size
    assert facts.masks == sum(len(meta["masks"]) for meta, *_ in records)
    assert facts.flipped == sum(meta["flip"] for meta, *_ in records) > 0
    assert facts.cropped == sum(meta["crop"] is not None for meta, *_ in records) > 0
    assert facts.tokens.tolist() == histogram(len(t[f"text.{e['text_id']}"]) for _, t, e in examples)
    assert facts.examples_per_clip.tolist() == histogram(len(meta["expressions"]) for meta, *_ in records)
    assert facts.objects.tolist() == histogram(len(m["masks"][e["mask"]]["anno_ids"]) for m, _, e in examples)
    clips = Counter(f"{len(m['frame_ids'])}x{m['size'][1]}x{m['size'][0]}" for m, *_ in records)
    assert dict(zip([b.name for b in facts.manifest.buckets], facts.clips_of_bucket)) == clips
    tiles = {name: value for value, name in re.findall(r"<b>([^<]*)</b><span>([^<]*)", page)}
    assert tiles["examples"] == f"{len(examples):,}" and tiles["clips, all views"] == f"{len(records):,}"
    assert tiles["masks"] == f"{facts.masks:,}" and tiles["views"] == "2"
    for bucket, number in clips.items():
        assert re.search(rf">{bucket}<td.*?in {number:,} clips?<", page), bucket


def test_the_examples_that_the_build_dropped_are_counted(cache, make_config, tmp_path):
    whole = tmp_path / "whole"
    build(make_config(whole, cache={"drop_empty_masks": False, "views": 2}))
    everything, kept = count(CacheReader(whole)), count(CacheReader(cache))
    assert everything.planned == everything.manifest.examples == kept.planned > kept.manifest.examples


def test_the_numbers_do_not_depend_on_how_many_rows_are_counted_at_once(cache, monkeypatch):
    whole = count(CacheReader(cache))
    monkeypatch.setattr(inspect_cache, "_ROWS", 3)
    parts = count(CacheReader(cache))
    for name in ("tokens", "examples_per_clip", "objects", "clips_of_bucket"):
        assert (getattr(whole, name) == getattr(parts, name)).all(), name
    assert (whole.bytes_by_kind, whole.masks, whole.sentences) == (parts.bytes_by_kind, parts.masks, parts.sentences)


def test_the_page_asks_for_nothing_outside_itself(page):
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 2 * 3 * 5 and all(s.startswith("data:image/jpeg;base64,") for s in sources)
    for outside in ("http", "<script", "<link", "@import", "url(", "file:"):
        assert outside not in page, outside


def test_the_page_names_what_made_the_cache_and_why_originals_are_missing(cache, page):
    manifest = CacheReader(cache).manifest
    fields = manifest.fingerprint.fields
    assert all(name in page for name in fields) and fields["model.vae"] in page
    assert all(version in page for version in manifest.environments[0].values())
    assert "Originals are left out" in page and "PSNR" not in page


def test_a_histogram_has_few_columns_and_loses_nothing():
    for last in (1, 5, 12, 13, 47, 256):
        counts = np.arange(last + 1)
        columns = _columns(counts)
        assert len(columns) <= 12 and sum(columns.values()) == counts.sum()


def test_a_seed_chooses_the_examples_and_each_is_there_once(cache, tiny_wan, monkeypatch):
    monkeypatch.setattr(ExampleDecoder, "decode", lambda self, example_id: example_id)
    reader = CacheReader(cache)
    decoder = ExampleDecoder(reader, wan=tiny_wan)
    first, again, other = (list(decoder.draw(8, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other and len(set(first)) == 8
    assert list(decoder.draw(10**6, seed=0)) == list(range(reader.manifest.examples))


def test_an_example_shows_its_own_latents_mask_and_the_originals_as_they_were_cut(configured, mevis):
    reader = CacheReader(configured)
    decoder = ExampleDecoder(reader)
    plan = units.read_plan(configured / units.FOLDER)
    planned = {(c.number, c.view): c for u in range(plan.clip_units) for c, _ in plan.unit_clips(u)}
    videos = {video.video_id: video for video in open_source(_data(configured)).videos()}
    ids = {bool(reader.record(i)["flip"]): i for i in range(reader.manifest.examples)}
    assert set(ids) == {False, True}
    for example_id in ids.values():
        example = decoder.decode(example_id)
        record = example.record
        clip = planned[record["clip"], record["view"]]
        frame_ids = [clip.frame_ids[place] for place in example.places]
        expected = [clip.geometry.frame(frame) for frame in videos[clip.video_id].frames(frame_ids)]
        assert (example.originals == np.stack(expected)).all()
        height, width = example.true.shape[1:]
        truth = record["masks"][example.expression["mask"]]["rle"]
        masks = [rle.decode(truth[place], size=(height, width), where="") for place in example.places]
        assert (example.true == np.stack(masks)).all()
        latent = reader.read(np.array([example_id]), needs={"video_mean"}, text_tokens=0)["video_mean"]
        with torch.no_grad():
            signed = decoder.vae.decode(latent.float()).sample[0]
        assert (example.frames == from_signed(signed)[example.places]).all()
        assert 0 <= example.iou <= 1 and example.psnr_db > 0


def _data(folder):
    from flowmask.data_pipeline.config import CacheSourceConfig

    return CacheSourceConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text())["data"])


def test_a_dataset_that_has_changed_is_not_shown_as_the_original(configured, mevis, tmp_path):
    copy = shutil.copytree(configured, tmp_path / "cache")
    root = shutil.copytree(mevis, tmp_path / "mevis")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["root"] = str(root)
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert ExampleDecoder(CacheReader(copy)).why_no_originals == ""
    expressions = root / "train" / "meta_expressions.json"
    expressions.write_text(expressions.read_text().replace("bright blue", "dark blue"))
    assert "is not what it was" in ExampleDecoder(CacheReader(copy)).why_no_originals
    shutil.rmtree(root)
    assert "out of reach" in ExampleDecoder(CacheReader(copy)).why_no_originals


@pytest.mark.parametrize("norm", ["half", "imagenet"])
def test_pixels_survive_normalising_and_back(norm):
    frames = [np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)]
    assert (from_signed(to_signed(frames, pixel_norm=norm), pixel_norm=norm)[0] == frames[0]).all()


def test_another_vae_or_none_is_refused_and_numbers_need_none(cache, tiny_wan, tmp_path):
    out = tmp_path / "cache.html"
    with pytest.raises(ConfigError, match=r"config\.yaml is missing.*--wan.*--examples 0"):
        inspect(cache, out=out)
    with pytest.raises(WeightsError, match="is no folder"):
        inspect(cache, out=out, wan=tmp_path / "nowhere")
    other = shutil.copytree(tiny_wan, tmp_path / "wan")
    weights = next((other / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(WeightsError, match="is not the VAE that made"):
        inspect(cache, out=out, wan=other)
    assert not out.exists()
    inspect(cache, out=out, examples=0)
    assert "Bytes by kind" in out.read_text() and "<img" not in out.read_text()


@pytest.mark.parametrize("damage", [(b'"flip":', b'"flap":'), (b'"flip":', b'"flip";')])
def test_a_damaged_record_is_one_line_that_names_its_example(cache, tmp_path, damage):
    copy = shutil.copytree(cache, tmp_path / "cache")
    shard = copy / "shards" / "000001.tar"
    shard.write_bytes(shard.read_bytes().replace(*damage, 1))
    with pytest.raises(CacheError, match=r"example [0-9]+(: a record)? is damaged.*flowmask cache verify"):
        inspect(copy, out=tmp_path / "cache.html", examples=0)


def test_what_is_no_cache_or_no_place_for_a_page_is_one_line(cache, tmp_path):
    for name, mark in {"empty": None, "run": "a training run", "begun": "a cache"}.items():
        (tmp_path / name).mkdir()
        if mark:
            (tmp_path / name / ".flowmask.json").write_text(f'{{"kind": "{mark}", "id": "0"}}')
    wrong = {
        tmp_path / "none": "no such cache",
        tmp_path / "empty": "empty is no cache; give the `out`",
        tmp_path / "run": "run is a training run, not a cache; give the `out`",
        tmp_path / "begun": "its build has not finished",
    }
    for folder, said in wrong.items():
        with pytest.raises(CacheError, match=said) as refusal:
            inspect(folder, out=tmp_path / "cache.html")
        assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="is a folder"):
        inspect(cache, out=tmp_path, examples=0)
    with pytest.raises(CacheError, match="cannot write"):
        inspect(cache, out=cache / "manifest.json" / "page.html", examples=0)


def test_the_page_shows_quarantine_datasets_and_what_was_kept_apart(cache, make_config, mevis, tmp_path):
    root = shutil.copytree(mevis, tmp_path / "mevis")
    (root / "train/JPEGImages/cars/00010.jpg").write_bytes(b"no image")
    (root / "valid").mkdir()
    (root / "valid/meta_expressions.json").write_text('{"videos": {"birds": {}}}')
    settings = {"leaks": "drop", "max_quarantined_fraction": 1.0}
    build(make_config(tmp_path / "cache", root=root, cache=settings))
    inspect(tmp_path / "cache", out=tmp_path / "cache.html", examples=0)
    text = (tmp_path / "cache.html").read_text()
    for shown in ("videos left out as leaks", "clips quarantined", "Quarantine:", "00010.jpg", "splits looked into"):
        assert shown in text, shown
    inspect(cache, out=tmp_path / "whole.html", examples=0)
    assert "Quarantine:" not in (tmp_path / "whole.html").read_text()
