"""Laws of `cache verify`: it names every wrong file, and no right one."""

import hashlib
import random
import shutil
from pathlib import Path

import pytest
from seals import rewrite

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.check.verify_masks import LATENT_TOLERANCE, MaskCheck
from flowmask.data_pipeline.check.verify_report import Problem, VerifyReport
from flowmask.models.errors import CacheError
from flowmask.models.weights.tiny_wan import write_tiny_wan


@pytest.fixture
def copy(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "cache")


def named(folder):
    return [problem.file.name for problem in verify(folder).problems]


def test_a_whole_cache_is_right(cache):
    report = verify(cache)
    assert report.ok and report.records > 5 and report.examples > 20


@pytest.mark.parametrize("place", [100, 600, 5000, -600])
def test_a_flipped_bit_anywhere_names_its_shard_alone(copy, place):
    shard = copy / "shards" / "000001.tar"
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    assert named(copy) == ["000001.tar"]


def test_a_shard_cut_in_half_or_missing_is_named_alone(copy):
    shard = copy / "shards" / "000002.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert named(copy) == ["000002.tar"]
    shard.unlink()
    assert named(copy) == ["000002.tar"]


def test_a_changed_index_is_named_alone(copy):
    content = bytearray((copy / "index.npy").read_bytes())
    content[-70] ^= 4
    (copy / "index.npy").write_bytes(content)
    assert named(copy) == ["index.npy"]


FILES = [
    "manifest.json", "index.npy", "quarantine.jsonl", "shards/000001.json", "shards/000001.tar",
    "plan/plan.json", "plan/clips.jsonl", "plan/clips.npy", "plan/texts.jsonl", "plan/texts.npy",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_named_alone_when_a_bit_of_it_flips_it_is_cut_or_gone(copy, name):
    path = copy / name
    content, draw = path.read_bytes(), random.Random(name)
    for place in [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(3))] if content else []:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert named(copy) == [path.name], (place, content[max(0, place - 20) : place + 20])
    for other in (content + b"x", content[: len(content) // 2]):
        if other != content:
            path.write_bytes(other)
            assert named(copy) == [path.name]
    if name == "manifest.json":
        return  # without it, the folder is no cache
    path.unlink()
    assert named(copy) == [path.name]


def test_two_wrong_files_are_both_named(copy):
    for name in ("shards/000001.tar", "manifest.json", "index.npy"):
        content = bytearray((copy / name).read_bytes())
        content[200] ^= 2
        (copy / name).write_bytes(content)
    assert named(copy) == ["index.npy", "manifest.json", "000001.tar"]


@pytest.mark.parametrize("name", ["shards/000001.tar", "shards/000001.json"])
def test_a_unit_without_its_shard_and_its_sidecar_names_these_two(copy, name):
    for suffix in (".tar", ".json"):
        (copy / "shards" / f"000001{suffix}").write_bytes(b"{}")
    assert named(copy) == ["000001.json", "000001.tar"]


def reseal(folder, shard, change):
    """Rewrite a shard's tensors by `change`, and its hash in sidecar and manifest, so that no hash is wrong."""
    import io
    import tarfile

    from safetensors.torch import load, save

    from flowmask.models.stored.sealed import seal, unseal

    path = folder / "shards" / shard
    content = bytearray(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(content))) as tar:
        for member in tar:
            if member.name.endswith(".safetensors"):
                end = member.offset_data + member.size
                content[member.offset_data : end] = save(change(load(bytes(content[member.offset_data : end]))))
    rehash(folder, shard, bytes(content))
    sidecar = path.with_suffix(".json")
    fields = unseal(sidecar.read_bytes()) | {"sha256": hashlib.sha256(content).hexdigest()}
    sidecar.write_bytes(seal(fields))


def shifted(tensors):
    return {n: t.roll(1, dims=3).contiguous() if n.startswith("mask") else t for n, t in tensors.items()}


@pytest.mark.parametrize("vae", ["random", "trained"])
def test_masks_decoded_from_latents_are_those_of_the_records(cache, make_config, tiny_wan, tmp_path, vae):
    folder, wan = cache, tiny_wan
    if vae == "trained":
        wan, folder = tmp_path / "wan", tmp_path / "cache"
        write_tiny_wan(wan)
        build(make_config(folder, wan=wan, cache={"views": 1}))
    report = verify(folder, decode_masks=4, wan=wan)
    assert report.ok and len(report.masks) == 4
    assert all(check.error < LATENT_TOLERANCE / 3 for check in report.masks)
    assert vae == "random" or min(check.iou for check in report.masks) > 0.6


def test_a_mask_latent_of_another_place_is_found_though_every_hash_is_right(copy, tiny_wan):
    reseal(copy, "000001.tar", shifted)
    assert verify(copy).ok
    (first, *_) = verify(copy, decode_masks=10**6, wan=tiny_wan).problems
    assert first.file.name == "000001.tar" and first.unit == 1 and "RLE" in first.reason


def test_without_weights_verify_says_that_no_mask_was_decoded(cache):
    report = verify(cache, decode_masks=2)
    assert report.ok and not report.masks and "config.yaml is missing" in report.not_decoded


def rehash(folder, name, content):
    """Replace a shard's bytes and their hash in the manifest, so that only the content is wrong."""
    (folder / "shards" / name).write_bytes(content)
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    rewrite(folder / "manifest.json", lambda m: [s.update(facts) for s in m["shards"] if s["file"] == name])


def test_content_that_disagrees_with_the_index_is_found_even_if_its_hash_is_right(copy):
    other = (copy / "shards" / "000002.tar").read_bytes()
    rehash(copy, "000001.tar", other)
    assert named(copy) == ["000001.tar"]


def test_a_number_that_is_not_finite_is_found_even_if_the_hash_is_right(copy):
    import numpy as np

    index = np.load(copy / "index.npy")
    row = index[index["shard"] == 1][0]
    content = bytearray((copy / "shards" / "000001.tar").read_bytes())
    content[int(row["video_mean"]) : int(row["video_mean"]) + 2] = b"\xc0\x7f"  # a bfloat16 NaN
    rehash(copy, "000001.tar", bytes(content))
    (problem,) = verify(copy).problems
    assert problem.file.name == "000001.tar" and "not finite" in problem.reason


def test_a_folder_without_manifest_is_no_cache(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(CacheError, match="flowmask cache build"):
        verify(copy)


def test_the_verdict_tells_damaged_files_from_masks_of_which_the_vae_shows_too_little():
    masks = [MaskCheck(Path("000000.tar"), clip="c", mask=0, iou=iou, error=0.0) for iou in (0.641, 0.7, 0.9)]
    assert VerifyReport(masks=masks[2:]).verdict(Path("cache")) == "Files intact."
    warning = "Warning: 2 of 3 decoded masks have IoU < 0.8 with the truth (lowest 0.641)."
    assert VerifyReport(masks=masks).verdict(Path("cache")) == f"Files intact. {warning}"
    wrong = VerifyReport(masks=masks, problems=[Problem(Path("index.npy"), "missing")])
    assert wrong.verdict(Path("cache")) == f"1 wrong: flowmask cache repair cache {warning}"
