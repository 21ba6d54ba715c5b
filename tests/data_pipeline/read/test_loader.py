"""Laws of reading: the bytes of the shards, in an order that does not depend on ranks, threads or restarts."""

import json
import shutil
import tarfile
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load

from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.read.epoch_plan import EpochPlan
from flowmask.data_pipeline.read.loader import Batch, Loader, copied
from flowmask.data_pipeline.read.reader import NEEDS, CacheReader
from flowmask.models.errors import CacheError, ConfigError

MASK = (1 << 64) - 1
LATENTS = {"video_mean", "mask_mean"}


@pytest.fixture
def reader(cache):
    reader = CacheReader(cache)
    yield reader
    reader.close()


def loader_of(reader, *, global_batch=8, rank=0, world_size=1, micro_batch=1, **rest):
    plan = EpochPlan(reader.buckets, global_batch=global_batch, seed=3)
    rest = {"needs": LATENTS, "text_tokens": 256} | rest
    return Loader(reader, plan, rank=rank, world_size=world_size, micro_batch=micro_batch, **rest)


def records_of(shard):
    """JSON, its place and the tensors of each record, read by standard libraries."""
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
        for described, stored in zip(members[::2], members[1::2], strict=True):
            meta = json.loads(tar.extractfile(described).read())
            yield meta, described.offset_data, load(tar.extractfile(stored).read())


def steps_of(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize(("slow", "name", "is_copy"), [(CacheReader, "read", False), (Batch, "to", True)])
def test_of_what_is_waited_for_reading_and_copying_are_told_apart(reader, monkeypatch, slow, name, is_copy, threads):
    real = getattr(slow, name)

    def slowly(*args, **named):
        time.sleep(0.1)
        return real(*args, **named)

    monkeypatch.setattr(slow, name, slowly)
    way = {"threads": threads, "prefetch_batches": 1, "prepare": lambda batch: copied(batch, "cpu")}
    loader = loader_of(reader, global_batch=2, **way)
    steps_of(loader, 3)
    assert loader.wait_s > 0.25
    assert 0 <= loader.copy_wait_s <= loader.wait_s and (loader.copy_wait_s > loader.wait_s / 2) == is_copy


def test_an_example_read_is_the_tensors_of_its_record(reader, cache):
    seen = 0
    for example in range(reader.manifest.examples):
        row = reader.index[example]
        shard = cache / "shards" / f"{int(row['shard']):06d}.tar"
        meta, tensors = next(
            (meta, tensors) for meta, place, tensors in records_of(shard) if place == int(row["record"])
        )
        expression = meta["expressions"][int(row["expression"])]
        read = reader.read(np.array([example]), needs=NEEDS, text_tokens=256)
        assert torch.equal(read["video_mean"][0], tensors["video.mean"])
        assert torch.equal(read["video_logvar"][0], tensors["video.logvar"])
        assert torch.equal(read["mask_mean"][0], tensors[f"mask.{expression['mask']}.mean"])
        text = tensors[f"text.{expression['text_id']}"]
        assert torch.equal(read["text"][0, : len(text)], text) and not read["text"][0, len(text) :].any()
        assert read["mask_pixels"].shape == (1, len(meta["frame_ids"]), meta["size"][1], meta["size"][0])
        seen += 1
    assert seen > 20


def test_a_sentence_too_long_for_the_trained_length_is_the_one_cut_before_the_encoder(reader, cache):
    long = np.flatnonzero(reader.index["short_text_tokens"])
    assert long.size and reader.manifest.longest_text_tokens > 64
    row = reader.index[long[0]]
    shard = cache / "shards" / f"{int(row['shard']):06d}.tar"
    content = shard.read_bytes()
    start = int(row["short_text"])
    stored = content[start : start + 64 * reader.manifest.text_dim * 2]
    read = reader.read(long[:1], needs={"text"}, text_tokens=64)["text"][0]
    assert read.shape == (64, reader.manifest.text_dim)
    assert read.view(torch.uint8).numpy().tobytes() == stored
    whole = reader.read(long[:1], needs={"text"}, text_tokens=256)["text"][0]
    assert not torch.equal(whole[:64], read), "cut before the encoder is not cut after it"


def test_a_text_length_that_no_stored_sentence_fits_is_refused_by_name(reader):
    with pytest.raises(ConfigError, match=r"model\.text_tokens is 32"):
        loader_of(reader, needs={"text"}, text_tokens=32)
    assert loader_of(reader, needs={"text"}, text_tokens=64, threads=0)


def digests(reader, *, world_size, steps, global_batch, threads):
    total = [0] * steps
    for rank in range(world_size):
        loader = loader_of(
            reader, global_batch=global_batch, rank=rank, world_size=world_size, needs=set(), threads=threads
        )
        for step, batches in enumerate(steps_of(loader, steps)):
            total[step] = total[step] + sum(batch.digest for batch in batches) & MASK
    return total


def test_the_global_batches_are_the_same_for_any_number_of_ranks_and_threads(reader):
    expected = digests(reader, world_size=1, steps=2, global_batch=1000, threads=0)
    plan = EpochPlan(reader.buckets, global_batch=1000, seed=3)
    by_hand = sum(mix64(place, int(i)) for place, i in enumerate(plan[0].example_ids)) & MASK
    assert expected[0] == by_hand
    for world_size, threads in ((1, 1), (1, 3), (2, 1), (4, 2), (8, 0), (1000, 0)):
        assert digests(reader, world_size=world_size, steps=2, global_batch=1000, threads=threads) == expected


def test_micro_batches_hold_the_same_examples_with_the_same_keys(reader):
    def examples(micro_batch):
        steps = steps_of(loader_of(reader, micro_batch=micro_batch), 4)
        rows = []
        for batches in steps:
            assert len(batches) == 8 // micro_batch
            for batch in batches:
                rows += zip(batch.positions.tolist(), batch.example_ids.tolist(), batch.keys, strict=True)
        return rows, torch.cat([batch.video_mean.flatten() for batches in steps for batch in batches])

    rows, tensors = examples(1)
    for micro_batch in (2, 4, 8):
        others, other_tensors = examples(micro_batch)
        assert others == rows
        assert torch.equal(other_tensors, tensors)


def test_starting_at_a_step_gives_what_that_step_would_have_given(reader):
    whole = steps_of(loader_of(reader, threads=2), 6)
    resumed = steps_of(loader_of(reader, start_step=4, threads=1, prefetch_batches=1), 2)
    for then, now in zip(whole[4:], resumed, strict=True):
        for a, b in zip(then, now, strict=True):
            assert (a.step, a.digest, a.keys) == (b.step, b.digest, b.keys)
            assert torch.equal(a.mask_mean, b.mask_mean)


def test_the_key_of_an_example_is_of_seed_epoch_example_and_step(reader):
    (batch,) = steps_of(loader_of(reader, micro_batch=8), 1)[0]
    ids, epochs = batch.example_ids.tolist(), batch.epochs.tolist()
    assert batch.keys == [mix64(3, epoch, i, 0) for epoch, i in zip(epochs, ids, strict=True)]


def test_only_what_is_needed_is_read(reader):
    (batch,) = steps_of(loader_of(reader, micro_batch=8, needs={"mask_pixels"}), 1)[0]
    assert batch.mask_pixels is not None and batch.mask_pixels.dtype == torch.bool
    assert batch.video_mean is batch.video_logvar is batch.mask_mean is batch.text is None


def test_prepare_runs_once_on_each_micro_batch(reader):
    def prepare(batch):
        batch.draws["key"] = torch.tensor([key % 1000 for key in batch.keys])
        return batch

    for batches in steps_of(loader_of(reader, micro_batch=4, prepare=prepare), 3):
        for batch in batches:
            assert batch.draws["key"].tolist() == [key % 1000 for key in batch.keys]


def test_an_error_of_a_reading_thread_surfaces_at_its_step_and_close_ends_the_threads(reader):
    def prepare(batch):
        if batch.step == 2:
            raise ValueError("spoiled")
        return batch

    loader = loader_of(reader, prepare=prepare, threads=2, prefetch_batches=4)
    next(loader), next(loader)
    with pytest.raises(ValueError, match="spoiled"):
        next(loader)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_a_batch_that_does_not_divide_is_refused(reader):
    with pytest.raises(ConfigError, match=r"multiple of train\.micro_batch x processes = 3 x 1"):
        loader_of(reader, micro_batch=3)


def test_more_shards_than_files_may_be_open_are_read_all_the_same(cache, reader, monkeypatch):
    monkeypatch.setattr("flowmask.data_pipeline.read.files._MAX_OPEN_FILES", 1)
    first = steps_of(loader_of(CacheReader(cache), threads=3), 5)
    second = steps_of(loader_of(reader, threads=0), 5)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x.video_mean, y.video_mean) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "flowmask cache build"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: damaged"),
        (lambda folder: (folder / "shards/000001.tar").unlink(), "000001.tar: missing from the cache"),
        (lambda folder: (folder / "shards/000001.tar").write_bytes(b"x"), "000001.tar: 1 bytes"),
        (lambda folder: (folder / "index.npy").write_bytes(b"x"), "index.npy: the index is damaged"),
        (lambda folder: np.save(folder / "index.npy", np.zeros(3)), "index.npy: "),
        (shutil.rmtree, "no such cache folder"),
    ],
)
def test_a_cache_that_is_not_whole_is_refused_with_the_file(cache, tmp_path, spoil, said):
    shutil.copytree(cache, tmp_path / "cache")
    spoil(tmp_path / "cache")
    with pytest.raises(CacheError, match=said) as raised:
        CacheReader(tmp_path / "cache")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("opened", [False, True], ids=["before it was read", "while it was read"])
def test_a_shard_cut_after_the_start_is_an_error_not_zeros(cache, tmp_path, opened):
    shutil.copytree(cache, tmp_path / "cache")
    reader = CacheReader(tmp_path / "cache")
    if opened:
        reader.read(np.array([0]), needs=LATENTS, text_tokens=256)
    shard = tmp_path / "cache" / "shards" / f"{int(reader.index[0]['shard']):06d}.tar"
    with shard.open("r+b") as file:
        file.truncate(600)
    said = "the file is truncated" if opened else f"{shard}: 600 bytes, the manifest says"
    with pytest.raises(CacheError, match=said) as raised:
        reader.read(np.array([0]), needs=LATENTS, text_tokens=256)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda shard: shard.unlink(), "missing from the cache"),
        (lambda shard: shard.write_bytes(b"x"), "1 bytes, the manifest says"),
    ],
)
def test_a_reader_that_does_not_check_at_the_start_names_a_shard_when_it_is_touched(cache, tmp_path, spoil, said):
    shutil.copytree(cache, tmp_path / "cache")
    spoil(tmp_path / "cache/shards/000001.tar")
    reader = CacheReader(tmp_path / "cache", check=False)
    here = reader.index["shard"] == 1
    assert reader.read(np.flatnonzero(~here)[:1], needs=LATENTS, text_tokens=256)
    with pytest.raises(CacheError, match=f"000001.tar: {said}"):
        reader.read(np.flatnonzero(here)[:1], needs=LATENTS, text_tokens=256)


def test_reading_ahead_is_bounded_by_the_batches_asked_for(reader):
    """Examples in memory: those in use, and `prefetch_batches` global batches of this rank's share."""
    alive = peak = 0
    lock = threading.Lock()

    def count(by):
        nonlocal alive, peak
        with lock:
            alive += by
            peak = max(peak, alive)

    def prepare(batch):
        count(len(batch))
        weakref.finalize(batch, count, -len(batch))
        return batch

    for depth in (1, 3, 20):
        alive = peak = 0
        with loader_of(reader, micro_batch=2, prefetch_batches=depth, prepare=prepare, threads=4) as loader:
            for _ in range(30):
                next(loader)
        assert peak <= 8 * (depth + 2), "those ahead, those just handed out and those before them"


def test_the_safetensors_of_a_record_load_with_the_plain_library(cache):
    with tarfile.open(next((cache / "shards").glob("*.tar"))) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".safetensors"))
        tensors = load(tar.extractfile(member).read())
    assert tensors["video.mean"].dtype == torch.bfloat16
