"""Clips with frames that are not annotated: the record names them, and verify, inspect and the readers respect it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build_workers import contents
from objective_lab import make
from sparse_layouts import FRAMES, box, write_listed

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.check import verify_masks
from flowmask.data_pipeline.check.repair import repair
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.clip.pixels import resize_masks
from flowmask.data_pipeline.config import CacheBuildConfig, LoaderConfig
from flowmask.data_pipeline.read.batches import open_batches, open_reader, plan_for
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.show import inspect_examples
from flowmask.data_pipeline.show.inspect_examples import ExampleDecoder
from flowmask.data_pipeline.show.inspect_page import inspect
from flowmask.models.errors import CacheError

KNOWN = [1, 4]


def whole(make_config: Any, out: Path, data: Path, **clip: Any) -> CacheBuildConfig:
    config = make_config(out, cache={"views": 1, "drop_empty_masks": False}, clip={"sampling": "whole", **clip})
    source = {"source": "videos", "root": data, "split": "train"}
    return CacheBuildConfig.model_validate({**config.model_dump(), "data": source})


@pytest.fixture(scope="module")
def config(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> CacheBuildConfig:
    """A finished cache of one whole video with two annotated frames, and a sentence that names nothing."""
    folder = tmp_path_factory.mktemp("partly")
    made = whole(
        make_config,
        folder / "cache",
        write_listed(folder / "data", annotated=KNOWN, without_target=True),
        augment=False,
    )
    build(made)
    return made


def test_the_record_says_which_frames_are_annotated_and_the_manifest_that_there_are_such(
    config: CacheBuildConfig,
) -> None:
    reader = CacheReader(config.out)
    record = reader.record(0)
    assert record["frame_ids"] == [*range(FRAMES), 5, 5, 5], "the last frame is repeated up to 4k + 1"
    assert [mask["annotated"] for mask in record["masks"]] == [[i in KNOWN for i in record["frame_ids"]]] * 2
    assert (reader.manifest.partly_annotated, reader.manifest.no_target, reader.manifest.examples) == (2, 1, 2)


def test_a_batch_has_the_frames_that_are_annotated_from_files_and_from_a_stream(config: CacheBuildConfig) -> None:
    reader = CacheReader(config.out)
    read = reader.read(np.array([0, 1]), needs={"mask_mean", "mask_pixels"}, text_tokens=0)
    assert read["annotated"].tolist() == [[i in KNOWN for i in [*range(FRAMES), 5, 5, 5]]] * 2
    assert "annotated" not in reader.read(np.array([0]), needs={"mask_mean"}, text_tokens=0)
    data = LoaderConfig(cache=f"file:{config.out}", mode="stream", retries=0)
    stream = open_reader(data)
    plan = plan_for(stream, global_batch=2, seed=0, remainder="carry")
    rest = {"rank": 0, "world_size": 1, "micro_batch": 2, "needs": {"mask_pixels"}, "text_tokens": 0}
    with open_batches(stream, plan, prefetch_batches=1, **rest) as batches:
        (batch,) = next(batches)
    assert batch.annotated is not None and batch.annotated.tolist() == read["annotated"].tolist()
    assert torch.equal(batch.mask_pixels.sort(0).values, read["mask_pixels"].sort(0).values)


def test_where_all_frames_are_annotated_nothing_is_said_and_bytes_are_those_of_before(
    make_config: Any, tmp_path: Path
) -> None:
    data = write_listed(tmp_path / "data", annotated=None)
    build(whole(make_config, tmp_path / "unsaid", data))
    entry = json.loads((data / "train.jsonl").read_text())
    (data / "train.jsonl").write_text(json.dumps({**entry, "annotated": list(range(FRAMES))}))
    build(whole(make_config, tmp_path / "said", data))
    shards = [(tmp_path / name / "shards/000000.tar").read_bytes() for name in ("unsaid", "said")]
    assert shards[0] == shards[1]
    reader = CacheReader(tmp_path / "said")
    assert "annotated" not in reader.record(0)["masks"][0] and reader.manifest.partly_annotated == 0
    assert "annotated" not in reader.read(np.array([0]), needs={"mask_pixels"}, text_tokens=0)


def test_sparse_clips_are_the_annotated_frames_one_by_one_with_the_draws_of_their_anchors(
    make_config: Any, tmp_path: Path
) -> None:
    data = write_listed(tmp_path / "data", annotated=KNOWN, without_target=True)
    build(whole(make_config, tmp_path / "cache", data, sampling="sparse", frames=5))
    reader = CacheReader(tmp_path / "cache")
    said = sorted((reader.record(i)["frame_ids"], reader.sentence(i)) for i in range(reader.manifest.examples))
    assert said == [([i], text) for i in KNOWN for text in ("the box", "the unicorn")]
    assert {bucket.frames for bucket in reader.manifest.buckets} == {1} and reader.manifest.partly_annotated == 0


def test_verify_and_inspect_look_at_annotated_frames_alone(
    config: CacheBuildConfig, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong mask in a frame that is not annotated does not change the IoU."""
    truth = np.stack([box(i) for i in [*range(FRAMES), 5, 5, 5]])

    def shown(_vae: Any, latent: torch.Tensor) -> np.ndarray:
        return resize_masks(truth, size=(latent.shape[3] * 8, latent.shape[2] * 8))  # the record has 1 and 4 alone

    monkeypatch.setattr(verify_masks, "shown", shown)
    monkeypatch.setattr(inspect_examples, "shown", shown)
    report = verify(config.out, decode_masks=2, wan=tiny_wan)
    assert report.ok and sorted(mask.iou for mask in report.masks) == [0, 1], "of nothing, and of the box"
    examples = [ExampleDecoder(CacheReader(config.out), wan=tiny_wan).decode(i) for i in range(2)]
    assert all(example.places == KNOWN for example in examples)
    assert sorted(example.iou for example in examples) == [0, 1]
    inspect(config.out, out=tmp_path / "page.html", examples=0)
    assert "examples with frames not annotated" in (tmp_path / "page.html").read_text()


def test_a_damaged_mask_of_frames_is_found_and_made_again(config: CacheBuildConfig, tmp_path: Path) -> None:
    copy = shutil.copytree(config.out, tmp_path / "cache")
    shard = copy / "shards/000000.tar"
    content = shard.read_bytes()
    assert content.count(b'"annotated":[false,true') == 2
    shard.write_bytes(content.replace(b'"annotated":[false,true', b'"annotated":[true,false'))
    report = verify(copy)
    assert [problem.file for problem in report.problems] == [shard]
    repair(copy, found=lambda: report, config=lambda: config)
    assert contents(copy) == contents(config.out)


def test_what_learns_from_whole_latents_is_refused_such_a_cache_in_one_line(config: CacheBuildConfig) -> None:
    manifest = CacheReader(config.out).manifest
    with pytest.raises(CacheError, match=r"2 examples with unannotated frames.*flow_matching .*clip\.sampling=sparse"):
        make().check_cache(manifest, where=config.out)
    make("mask_decoder").check_cache(manifest, where=config.out)
    assert json.loads((config.out / "manifest.json").read_text())["partly_annotated"] == 2
