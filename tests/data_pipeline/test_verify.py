"""Laws of `cache verify`: a wrong file is named, no right one is."""

import hashlib
import json
import shutil

import pytest

from data_pipeline.verify import verify
from models.errors import CacheError


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


def rehash(folder, name, content):
    """Put other bytes in a shard and their hash in the manifest: only the content can tell."""
    (folder / "shards" / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        if shard["file"] == name:
            shard["sha256"], shard["size"] = hashlib.sha256(content).hexdigest(), len(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))


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
