"""Sentences that name nothing in a cache: kept with the empty mask as target (encoded once), or dropped."""

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build_workers import contents
from layouts import write_youtube
from sparse_layouts import FRAMES, write_listed

from flowmask.data_pipeline.build import encode
from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.cache.manifest import read_manifest
from flowmask.data_pipeline.check.repair import repair
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.plan.units import read_plan
from flowmask.data_pipeline.read.mixture import MixtureReader
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.show.inspect_page import inspect
from flowmask.models.errors import CacheError, DataError
from flowmask.models.vae import encode_mask
from flowmask.models.weights.wan import WanFolder

GONE = {"birds": ["1"], "cars": ["1", "3"]}  # sentences of each video that name nothing


@pytest.fixture(scope="module")
def data(mevis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("v2") / "data"
    shutil.copytree(mevis, root)
    path = root / "train/meta_expressions.json"
    meta = json.loads(path.read_text())
    for video_id, exp_ids in GONE.items():
        for exp_id in exp_ids:
            meta["videos"][video_id]["expressions"][exp_id]["anno_id"] = []
    path.write_text(json.dumps(meta))
    return root


@pytest.fixture(scope="module")
def kept(data: Path, make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[CacheBuildConfig, list[Any]]:
    """A finished cache that keeps such sentences, and the shapes of the empty masks that were encoded."""
    config, empty = make_config(tmp_path_factory.mktemp("kept") / "cache", root=data), []

    def counted(vae: Any, masks: torch.Tensor) -> torch.Tensor:
        empty.extend(tuple(mask.shape) for mask in masks if not mask.any())
        return encode_mask(vae, masks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "encode_mask", counted)
        build(config)
    return config, empty


def of_nothing(reader: CacheReader) -> list[int]:
    """Example ids whose mask has no annotation."""
    return [
        i
        for i in range(reader.manifest.examples)
        if not reader.record(i)["masks"][int(reader.index[i]["mask"])]["anno_ids"]
    ]


def test_they_are_examples_with_the_empty_masks_latent_encoded_once_for_the_whole_build(
    kept: tuple[CacheBuildConfig, list[Any]], tiny_wan: Path
) -> None:
    config, encoded = kept
    reader = CacheReader(config.out)
    examples = of_nothing(reader)
    plan = read_plan(config.out / "plan")
    assert plan is not None
    clips = [clip for unit in range(plan.clip_units) for clip, _ in plan.unit_clips(unit)]
    assert len(examples) == sum(len(GONE.get(clip.video_id, [])) for clip in clips) > 10
    assert reader.manifest.no_target == len(examples) and reader.manifest.partly_annotated == 0
    shapes = {reader.bucket_of(i).name for i in examples}
    assert len(encoded) == len(set(encoded)) == len(shapes) > 0, "once a shape, whatever the clips and views"
    vae = WanFolder(tiny_wan).vae()
    for i in examples:
        read = reader.read(np.array([i]), needs={"mask_mean", "mask_pixels"}, text_tokens=0)
        assert not read["mask_pixels"].any()
        alone = encode_mask(vae, read["mask_pixels"])
        assert torch.equal(read["mask_mean"], alone.to(torch.bfloat16))


def test_a_clip_without_the_objects_of_its_other_sentences_stays_for_the_one_that_names_nothing(
    make_config: Any, tmp_path: Path
) -> None:
    """drop_empty_masks leaves out an object that is absent from a clip, but keeps a sentence that names nothing."""
    data = write_listed(tmp_path / "data", annotated=None, without_target=True)
    entry = json.loads((data / "train.jsonl").read_text())
    entry["expressions"][0]["masks"][1:] = [None] * (FRAMES - 1)  # the box is only in the first frame
    (data / "train.jsonl").write_text(json.dumps(entry))
    config = make_config(tmp_path / "cache", clip={"frames": 1, "augment": False}, cache={"views": 1})
    source = {"source": "videos", "root": data, "split": "train"}
    build(CacheBuildConfig.model_validate({**config.model_dump(), "data": source}))
    manifest = read_manifest(tmp_path / "cache")
    assert (manifest.clips, manifest.examples, manifest.no_target) == (FRAMES, FRAMES + 1, FRAMES)
    assert manifest.dropped_empty_masks == FRAMES - 1


def test_dropped_they_leave_what_the_other_sentences_alone_would_give(
    data: Path, make_config: Any, tmp_path: Path, kept: tuple[CacheBuildConfig, list[Any]]
) -> None:
    shutil.copytree(data, tmp_path / "rest")
    path = tmp_path / "rest/train/meta_expressions.json"
    meta = json.loads(path.read_text())
    for video_id, exp_ids in GONE.items():
        for exp_id in exp_ids:
            del meta["videos"][video_id]["expressions"][exp_id]
    path.write_text(json.dumps(meta))
    build(make_config(tmp_path / "dropped", root=data, cache={"no_target": "drop"}))
    build(make_config(tmp_path / "without", root=tmp_path / "rest"))
    dropped, without = read_manifest(tmp_path / "dropped"), read_manifest(tmp_path / "without")
    assert [s.sha256 for s in dropped.shards] == [s.sha256 for s in without.shards] and dropped.no_target == 0
    assert dropped.fingerprint.fields["cache.no_target"] == "drop"
    assert "no_target" not in json.loads((tmp_path / "dropped/manifest.json").read_text())
    with pytest.raises(CacheError, match=r"cache\.no_target: keep there, drop asked for"):
        build(make_config(kept[0].out, root=data, cache={"no_target": "drop"}))


def test_where_no_sentence_names_nothing_no_file_says_a_word_of_it(
    cache: Path, make_config: Any, tmp_path: Path
) -> None:
    build(make_config(tmp_path / "cache", cache={"no_target": "drop"}))
    assert contents(tmp_path / "cache") == contents(cache)
    texts = [path.read_bytes() for path in cache.rglob("*.json")]
    assert texts and not any(b"no_target" in text or b"annotated" in text for text in texts)


def test_verify_inspect_and_repair_know_them(
    kept: tuple[CacheBuildConfig, list[Any]], tmp_path: Path, tiny_wan: Path
) -> None:
    config, _ = kept
    before = contents(config.out)
    copy = shutil.copytree(config.out, tmp_path / "cache")
    assert verify(copy, decode_masks=40, wan=tiny_wan).ok
    facts = inspect(copy, out=tmp_path / "page.html", examples=0)
    assert facts.objects[0] == facts.manifest.no_target
    assert "examples that name nothing" in (tmp_path / "page.html").read_text()
    (copy / "shards/000000.json").write_text("{}")
    (copy / "shards/000001.tar").unlink()
    repair(copy, found=lambda: verify(copy), config=lambda: config)
    assert contents(copy) == before


def test_a_mixture_counts_those_of_all_its_caches(kept: tuple[CacheBuildConfig, list[Any]], cache: Path) -> None:
    mixed = MixtureReader([CacheReader(kept[0].out), CacheReader(cache)], shares=[Fraction(1, 2)] * 2)
    assert mixed.manifest.no_target == read_manifest(kept[0].out).no_target


def test_a_split_in_which_every_sentence_names_nothing_can_be_kept_but_not_dropped(
    data: Path, make_config: Any, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data/train/meta_expressions.json"
    meta = json.loads(path.read_text())
    for video in meta["videos"].values():
        for entry in video["expressions"].values():
            entry["anno_id"] = []
    path.write_text(json.dumps(meta))
    build(make_config(tmp_path / "keep", root=tmp_path / "data", cache={"views": 1}))
    manifest = read_manifest(tmp_path / "keep")
    assert manifest.no_target == manifest.examples > 0
    with pytest.raises(DataError, match="no example is left"):
        build(make_config(tmp_path / "drop", root=tmp_path / "data", cache={"views": 1, "no_target": "drop"}))


def test_an_object_that_no_mask_holds_is_refused_before_the_plan_is_written(make_config: Any, tmp_path: Path) -> None:
    write_youtube(tmp_path / "data")
    (tmp_path / "data/train/meta.json").unlink()
    path = tmp_path / "data/meta_expressions/train/meta_expressions.json"
    meta = json.loads(path.read_text())
    meta["videos"]["2c3d"]["expressions"]["1"]["obj_id"] = "9"
    path.write_text(json.dumps(meta))
    config = make_config(tmp_path / "cache")
    data = {"source": "ref_youtube_vos", "root": tmp_path / "data", "split": "train"}
    with pytest.raises(DataError, match="video 2c3d: expression 1 names object 9"):
        build(CacheBuildConfig.model_validate({**config.model_dump(), "data": data}))
    ours = {"weights.json", ".flowmask.json"}
    assert not [p for p in config.out.rglob("*") if p.is_file() and "claims" not in p.parts and p.name not in ours]
