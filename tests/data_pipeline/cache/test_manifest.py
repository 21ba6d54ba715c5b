"""A valid manifest: every value in its range, equal counts, a seal. Any other manifest is refused in one line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from seals import rewrite

from flowmask.data_pipeline.cache.index import ROW
from flowmask.data_pipeline.cache.manifest import read_manifest
from flowmask.data_pipeline.check.repair import repair
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.models.errors import CacheError
from flowmask.models.files import sha256_of

Change = Callable[[dict[str, Any]], Any]


def put(name: str, value: Any) -> Change:
    return lambda manifest: manifest.update({name: value})


def of_shard(**facts: Any) -> Change:
    return lambda manifest: manifest["shards"][0].update(facts)


def of_bucket(**facts: Any) -> Change:
    return lambda manifest: manifest["buckets"][0].update(facts)


WRONG: dict[str, Change] = {
    "a deviation of 0": lambda m: m["latents_std"].__setitem__(3, 0.0),
    "a negative deviation": lambda m: m["latents_std"].__setitem__(3, -1.0),
    "a deviation that is no number": lambda m: m["latents_std"].__setitem__(3, float("nan")),
    "an endless mean": lambda m: m["latents_mean"].__setitem__(0, float("inf")),
    "a mean that is a word": lambda m: m["latents_mean"].__setitem__(0, "0.5"),
    "a mean too few": lambda m: m["latents_mean"].pop(),
    "other channels": put("latent_channels", 4),
    "an unknown dtype": put("dtype", "float16"),
    "an unknown norm": put("pixel_norm", "zero"),
    "a flag that is a number": put("lowercase", 1),
    "no views": put("views", 0),
    "a view too many": put("views", 3),
    "fewer examples": lambda m: m.update(examples=m["examples"] - 1),
    "a negative count": put("clips", -1),
    "a count that is a word": put("clips", "12"),
    "a count beyond 64 bits": put("clips", 1 << 70),
    "another index": lambda m: m["index"].update(file="../index.npy"),
    "a negative size": lambda m: m["index"].update(size=-1),
    "a hash that is none": lambda m: m["index"].update(sha256="0"),
    "a shard with a command": of_shard(file="000000.tar; touch X"),
    "a shard in quotes": of_shard(file='000000.tar" $(touch X) "'),
    "a shard elsewhere": of_shard(file="../../other/shards/000000.tar"),
    "a shard on two lines": of_shard(file="000000.tar\n"),
    "a shard twice": lambda m: m["shards"].append(m["shards"][0]),
    "an environment that is not there": of_shard(made_with=9),
    "a view that is not there": of_shard(view=7),
    "more examples than bytes": of_shard(examples=[1 << 40]),
    "a bucket out of order": of_bucket(first=[5, 6]),
    "a bucket that is no size": of_bucket(height=33),
    "a bucket larger than its shards": of_bucket(height=1 << 20, width=1 << 20),
    "a text larger than its shards": put("text_dim", 1 << 30),
    "an unknown key": put("extra", 1),
    "an unknown schema": put("schema_version", 3),
    "no buckets": lambda m: m.pop("buckets"),
}


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cache, tmp_path / "cache")


@pytest.mark.parametrize("name", WRONG)
def test_a_value_out_of_its_range_is_refused_though_the_seal_is_right(copy: Path, name: str) -> None:
    rewrite(copy / "manifest.json", WRONG[name])
    with pytest.raises(CacheError, match=r"manifest\.json: damaged") as raised:
        read_manifest(copy)
    assert "\n" not in str(raised.value)


def test_a_value_that_has_changed_is_refused_though_it_is_in_its_range(copy: Path) -> None:
    path = copy / "manifest.json"
    content = path.read_text()
    path.write_text(content.replace('"pixel_norm": "half"', '"pixel_norm": "imagenet"'))
    with pytest.raises(CacheError, match="its seal is broken"):
        read_manifest(copy)
    path.write_text("".join(line for line in content.splitlines(keepends=True) if '"seal"' not in line))
    with pytest.raises(CacheError, match="damaged"):  # the comma before the seal stays
        read_manifest(copy)
    path.write_text(content.replace('"seal": "', '"seal_": "'))
    with pytest.raises(CacheError, match="it has no seal, which schema_version 2 must have"):
        read_manifest(copy)


def test_an_older_manifest_opens_with_one_line_and_gets_a_seal_when_it_is_written_again(
    copy: Path, make_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = copy / "manifest.json"
    made = path.read_bytes()
    rewrite(path, put("schema_version", 1))
    path.write_text("".join(path.read_text().rpartition(',\n "seal"')[0]) + "\n}\n")
    with caplog.at_level("WARNING", "flowmask"):
        assert read_manifest(copy).schema_version == 1
        read_manifest(copy)
    (said,) = caplog.messages
    assert str(path) in said and "has no seal" in said
    assert verify(copy).ok
    (copy / "quarantine.jsonl").write_text("{}")  # the quarantine is wrong too
    repair(copy, found=lambda: verify(copy), config=lambda: make_config(copy))
    assert path.read_bytes() == made


@pytest.mark.parametrize("column", ["mask_mean", "video_mean", "record", "text"])
def test_an_index_whose_columns_were_moved_is_refused(copy: Path, column: str) -> None:
    index = np.load(copy / "index.npy")
    index[column] = np.roll(index[column], 7)
    np.save(copy / "index.npy", index)
    with pytest.raises(CacheError, match=r"index\.npy: the index is damaged: its SHA-256"):
        CacheReader(copy)


ROWS: dict[str, tuple[str, int]] = {
    "a record of 4 GB": ("record_length", (1 << 32) - 1),
    "a record behind the end": ("record", 1 << 60),
    "a latent behind the end": ("mask_mean", (1 << 64) - 1),
    "a text of 65,535 tokens": ("text_tokens", (1 << 16) - 1),
    "a bucket that is not there": ("bucket", 999),
    "a shard that is not there": ("shard", 7_000_000),
    "a mask that is not there": ("mask", 999),
    "an expression that is not there": ("expression", 999),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_strangers_row_that_leads_nowhere_is_one_line(copy: Path, name: str) -> None:
    """The hash is right: the maker of the cache wrote it."""
    column, value = ROWS[name]
    index = np.load(copy / "index.npy")
    index[column][0] = value
    np.save(copy / "index.npy", index)
    assert index.dtype == ROW
    rewrite(copy / "manifest.json", lambda manifest: manifest["index"].update(sha256=sha256_of(copy / "index.npy")))
    reader = CacheReader(copy)
    with pytest.raises(CacheError) as raised:
        reader.read(np.array([0]), needs=("mask_mean", "text", "mask_pixels"), text_tokens=256)
        reader.sentence(0)
    assert "\n" not in str(raised.value)
    reader.close()
