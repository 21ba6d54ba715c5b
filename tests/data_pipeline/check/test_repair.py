"""Laws of `cache repair`: wrong files are made again with the same bytes, and no other file changes."""

import json
import os
import random
import shutil
import struct
import tarfile
from pathlib import Path

import pytest
from build_workers import contents, start_repair
from seals import rewrite
from trials import SEED, TRIALS

from flowmask.data_pipeline.build import build as building
from flowmask.data_pipeline.check.compare import compare
from flowmask.data_pipeline.check.repair import repair
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.models.errors import CacheError, ConfigError, DataError

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def copy(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "cache")


def mend(folder, config=None, **options):
    def unknown() -> CacheBuildConfig:
        raise AssertionError("nothing has to be encoded here")

    return repair(folder, found=lambda: verify(folder), config=(lambda: config) if config else unknown, **options)


def stamps(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


def regions(shard: Path) -> dict[str, int]:
    """One byte of every kind of region of a shard."""
    with tarfile.open(shard) as tar:
        meta, tensors = tar.getmembers()[:2]
        last = tar.getmembers()[-1]
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[tensors.offset_data : tensors.offset_data + 8])
    return {
        "tar header": meta.offset + 3,
        "json": meta.offset_data + meta.size // 2,
        "padding": meta.offset_data + meta.size + 1,
        "length of the safetensors header": tensors.offset_data + 1,
        "safetensors header": tensors.offset_data + 8 + length // 2,
        "tensor data": tensors.offset_data + 8 + length + 5,
        "last byte of the tensors": last.offset_data + last.size - 1,
        "end of the tar": len(content) - 1,
    }


def test_a_bit_flipped_in_any_region_and_a_cut_anywhere_are_found_and_mended(cache, copy, make_config):
    shard, config = copy / "shards" / "000001.tar", make_config(copy)
    whole = shard.read_bytes()
    for name, place in regions(shard).items():
        for damaged in (whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :], whole[:place]):
            shard.write_bytes(damaged)
            assert [problem.file for problem in verify(copy).problems] == [shard], name
    report = mend(copy, config)
    assert report.mended == [(shard, "encoded again: the same bytes")] and not report.notes
    assert contents(copy) == contents(cache)


@pytest.mark.long
def test_every_region_of_every_shard_is_mended_to_the_same_bytes(cache, copy, make_config):
    draw = random.Random(SEED)
    for _ in range(3 * TRIALS):
        for shard in draw.sample(sorted((copy / "shards").glob("*.tar")), 2):
            content = bytearray(shard.read_bytes())
            content[draw.choice(list(regions(shard).values()))] ^= 1 << draw.randrange(8)
            shard.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        mend(copy, make_config(copy))
        assert contents(copy) == contents(cache)


@pytest.mark.parametrize("name", ["index.npy", "manifest.json", "quarantine.jsonl", "shards/000002.json"])
def test_what_follows_from_the_shards_is_mended_without_dataset_or_weights(cache, copy, name):
    path = copy / name
    path.write_bytes(b"x" + path.read_bytes()[40:])
    report = mend(copy)
    assert [file for file, _ in report.mended] == [path]
    assert contents(copy) == contents(cache)


def test_all_that_follows_from_shards_and_plan_is_mended_at_once(cache, copy):
    for path in (copy / "index.npy", copy / "quarantine.jsonl", *(copy / "shards").glob("*.json")):
        path.unlink()
    mend(copy)
    assert contents(copy) == contents(cache)


@pytest.mark.parametrize("name", ["plan.json", "clips.jsonl", "clips.npy", "texts.jsonl"])
def test_the_plan_is_made_anew_from_the_dataset(cache, copy, make_config, name):
    (copy / "plan" / name).write_bytes(b"{")
    report = mend(copy, make_config(copy))
    assert [file.name for file, _ in report.mended] == [name]
    assert contents(copy) == contents(cache)


def test_everything_but_the_manifest_may_be_gone(cache, copy, make_config):
    for folder in ("shards", "plan"):
        shutil.rmtree(copy / folder)
        (copy / folder).mkdir()
    (copy / "index.npy").unlink()
    mend(copy, make_config(copy))
    assert contents(copy) == contents(cache)


def test_only_the_wrong_unit_is_encoded_and_written(cache, copy, make_config, monkeypatch):
    from flowmask.data_pipeline.build.clip_pass import ClipPass

    before, encoded, real = stamps(copy / "shards"), [], ClipPass.write_unit
    monkeypatch.setattr(ClipPass, "write_unit", lambda self, unit: (encoded.append(unit), real(self, unit))[1])
    (copy / "shards" / "000003.tar").unlink()
    mend(copy, make_config(copy))
    changed = {path.name for path, stamp in stamps(copy / "shards").items() if before.get(path) != stamp}
    assert encoded == [3] and changed - {"shards"} == {"000003.tar", "000003.json"}


def test_a_whole_cache_is_not_touched(copy):
    before = stamps(copy)
    report = mend(copy)
    assert report.mended == [] and stamps(copy) == before


def test_a_unit_that_is_named_is_encoded_again_without_looking(cache, copy, make_config):
    report = repair(copy, found=pytest.fail, config=lambda: make_config(copy), rebuild=[2])
    assert [file.name for file, _ in report.mended] == ["000002.tar"]
    assert contents(copy) == contents(cache)
    with pytest.raises(ConfigError, match=r"has no unit 99; its last is 5"):
        repair(copy, found=pytest.fail, config=lambda: make_config(copy), rebuild=[99])


@pytest.fixture
def other_device(monkeypatch):
    """Let this machine act as another device: it records other versions, and rounds a little differently."""
    from flowmask.data_pipeline.build import encode

    monkeypatch.setattr(building, "_environment", lambda device: {"device": "another GPU", "torch": "9"})
    for name in ("encode_moments", "encode_mask"):
        real = getattr(encode, name)

        def rounded(vae, pixels, real=real):
            result = real(vae, pixels)
            return tuple(r * 1.004 for r in result) if isinstance(result, tuple) else result * 1.004

        monkeypatch.setattr(encode, name, rounded)


def test_another_device_is_told_and_recorded_and_its_latents_are_equal_within_the_tolerance(
    cache, copy, make_config, tiny_wan, other_device
):
    (copy / "shards" / "000001.tar").unlink()
    report = mend(copy, make_config(copy))
    (note,) = report.notes
    assert "unit 1 was made with device cpu" in note and "device another GPU, torch 9" in note
    manifest = json.loads((copy / "manifest.json").read_text())
    made = {entry["file"]: manifest["environments"][entry["made_with"]]["device"] for entry in manifest["shards"]}
    assert {file for file, device in made.items() if device == "another GPU"} == {"000001.tar"}
    assert verify(copy, decode_masks=10**6, wan=tiny_wan).ok
    changed = {name for name, digest in contents(copy).items() if contents(cache)[name] != digest}
    assert changed == {"manifest.json", "shards/000001.tar", "shards/000001.json"}
    comparison = compare(copy, cache)
    assert not comparison.problems and comparison.identical == comparison.shards - 1
    assert 0.001 < comparison.largest_error["video"] < comparison.tolerance


def test_a_comparison_names_what_is_beyond_the_tolerance(cache, copy):
    shard = copy / "shards" / "000001.tar"
    place = regions(shard)["tensor data"]
    content = bytearray(shard.read_bytes())
    content[place : place + 400] = bytes(400)
    shard.write_bytes(content)
    rewrite(copy / "manifest.json", lambda manifest: manifest["shards"][1].update(sha256="0" * 64))
    assert any("000001.tar: clip" in problem for problem in compare(copy, cache).problems)


def kill_and_mend(folder: Path, config: CacheBuildConfig, *, whole: Path, seed: int) -> None:
    draw = random.Random(seed)
    for name in ("000001.tar", "000004.tar"):
        os.truncate(folder / "shards" / name, draw.randrange(9000))
    worker = start_repair(config)
    worker.follow(draw.randint(1, 13))
    worker.kill()
    mend(folder, config)
    assert contents(folder) == contents(whole)


def test_a_repair_that_is_killed_goes_on(cache, copy, make_config):
    for seed in (1, 2):
        kill_and_mend(copy, make_config(copy), whole=cache, seed=seed)


@pytest.mark.long
def test_many_repairs_that_are_killed_go_on(cache, copy, make_config):
    for trial in range(3 * TRIALS):
        seed = SEED + trial
        kill_and_mend(copy, make_config(copy), whole=cache, seed=seed)


def test_a_repair_killed_between_any_two_of_its_files_is_mended_by_the_next(
    cache, copy, make_config, monkeypatch, other_device
):
    """Also when the new bytes differ; the process ends at each rename in turn."""

    class GoneError(BaseException):
        pass

    real, left = Path.replace, [0]

    def replace(self, target):
        if left[0] == 0:
            raise GoneError
        left[0] -= 1
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    for renames in range(20):
        folder = shutil.copytree(cache, copy.parent / f"cache{renames}")
        os.truncate(folder / "shards" / "000001.tar", 100)
        left[0] = renames
        try:
            mend(folder, make_config(folder))
        except GoneError:
            left[0] = -1
            mend(folder, make_config(folder))
        else:
            assert renames > 4
            break
        assert verify(folder).ok
        shutil.rmtree(folder)
    else:
        pytest.fail("the repair never ended")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cache": {"seed": 1}}, "cache.seed: 0 there, 1 asked for"),
        ({"clip": {"frames": 9}, "cache": {"batch_clips": 3}}, r"cache\.batch_clips.*clip\.frames: 5 there"),
    ],
)
def test_other_settings_are_refused_with_the_fields(copy, make_config, change, said):
    (copy / "shards" / "000001.tar").unlink()
    before = contents(copy)
    with pytest.raises(CacheError, match=said) as refusal:
        mend(copy, make_config(copy, **change))
    assert "\n" not in str(refusal.value) and contents(copy) == before


def test_a_changed_or_vanished_dataset_is_refused_and_nothing_is_written(copy, make_config, mevis, tmp_path):
    (copy / "shards" / "000001.tar").unlink()
    before = contents(copy)
    root = shutil.copytree(mevis, tmp_path / "mevis")
    meta = root / "train" / "meta_expressions.json"
    meta.write_text(meta.read_text().replace("bright blue", "dark blue"))
    with pytest.raises(CacheError, match=r"data\.expressions"):
        mend(copy, make_config(copy, root=root))
    shutil.rmtree(root)
    with pytest.raises(DataError, match=r"cannot repair .* without its dataset and its encoders") as refusal:
        mend(copy, make_config(copy, root=root))
    assert "\n" not in str(refusal.value) and contents(copy) == before


def test_a_frame_that_could_be_read_then_and_not_now_is_refused_not_quarantined(copy, make_config, mevis, tmp_path):
    (copy / "shards" / "000001.tar").unlink()
    before = contents(copy)
    root = shutil.copytree(mevis, tmp_path / "mevis")
    for frame in root.rglob("*.jpg"):
        frame.write_bytes(bytes(frame.stat().st_size))  # the same size, so the fingerprint can't tell
    with pytest.raises((CacheError, DataError), match="jpg"):
        mend(copy, make_config(copy, root=root))
    assert contents(copy) == before


def test_two_repairs_at_once_are_refused_and_an_unfinished_cache_is_none(copy, make_config):
    def again():
        mend(copy)
        return verify(copy)

    with pytest.raises(CacheError, match="is being repaired by another process"):
        repair(copy, found=again, config=lambda: make_config(copy))
    (copy / "manifest.json").unlink()
    (copy / "work").mkdir()
    for options in ({}, {"rebuild": [1]}):
        with pytest.raises(CacheError, match="has not finished"):
            mend(copy, make_config(copy), **options)
    assert (copy / "work").is_dir()
