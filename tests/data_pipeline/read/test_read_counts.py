"""The reader's file-system calls are counted exactly: one more open or one more byte fails here."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from counters import events, reads

from flowmask.data_pipeline.cache.shards import shard_name
from flowmask.data_pipeline.read import files as reading
from flowmask.data_pipeline.read.epoch_plan import EpochPlan
from flowmask.data_pipeline.read.loader import Loader
from flowmask.data_pipeline.read.reader import LATENTS, CacheReader

NEEDS = [{"video_mean"}, {*LATENTS, "text"}, {"mask_mean", "mask_pixels"}]


@pytest.fixture
def reader(cache: Path) -> Iterator[CacheReader]:
    reader = CacheReader(cache)
    yield reader
    reader.close()


def epoch(reader: CacheReader, needs: set[str]) -> list[int]:
    """The examples of 20 steps, read by the trainer's loader in this thread."""
    plan = EpochPlan(reader.buckets, global_batch=8, seed=3)
    way = {"rank": 0, "world_size": 1, "micro_batch": 2, "threads": 0}
    with Loader(reader, plan, needs=needs, text_tokens=256, **way) as loader:
        return [int(i) for _ in range(20) for batch in next(loader) for i in batch.example_ids]


def parts(reader: CacheReader, example: int, needs: set[str]) -> list[tuple[int, int]]:
    """First and last byte of each tensor that an example needs, in its shard's order."""
    row, size = reader.index[example], reader.dtype.itemsize
    latent = 16 * int(np.prod(reader.bucket_of(example).latent_shape)) * size
    found = [(int(row[name]), latent) for name in needs & set(LATENTS)]
    if "text" in needs:
        found.append((int(row["text"]), int(row["text_tokens"]) * reader.manifest.text_dim * size))
    return sorted((start, start + length) for start, length in found)


def expected(reader: CacheReader, examples: list[int], needs: set[str]) -> list[int]:
    """Sizes of the reads: adjacent tensors in one read, and the record in another when masks are needed."""
    sizes = []
    for example in examples:
        before = None
        for start, end in parts(reader, example, needs):
            if start == before:
                sizes[-1] += end - start
            else:
                sizes.append(end - start)
            before = end
        if "mask_pixels" in needs:
            sizes.append(int(reader.index[example]["record_length"]))
    return sizes


@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: "+".join(sorted(needs)))
def test_an_example_costs_its_own_bytes_once_and_a_read_for_tensors_side_by_side(
    reader: CacheReader, needs: set[str]
) -> None:
    with reads() as sizes:
        examples = epoch(reader, needs)
    assert Counter(sizes) == Counter(expected(reader, examples, needs))
    assert len(examples) == 160


def opened(cache: Path) -> Counter[str]:
    """The cache's files that are opened between its opening and the end of the steps, with counts."""
    with events() as seen:
        reader = CacheReader(cache)
        shards = {int(reader.index[example]["shard"]) for example in epoch(reader, {"video_mean", "mask_pixels"})}
        reader.close()
    assert len(shards) == len(reader.manifest.shards)
    inside = {name.removeprefix(f"open {cache}/"): often for name, often in seen.items()}
    return Counter({name: often for name, often in inside.items() if not name.startswith(("open", "import"))})


def files(cache: Path) -> Counter[str]:
    """Every file of a cache once, and its index three more times: for numpy's map."""
    shards = [f"shards/{shard.name}" for shard in (cache / "shards").glob("*.tar")]
    return Counter([*shards, "manifest.json", *["index.npy"] * 4])


def test_every_file_of_a_cache_is_opened_once_however_often_it_is_read(cache: Path) -> None:
    assert opened(cache) == files(cache)


def test_a_shard_opened_again_is_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MAX_OPEN_FILES", 1)
    found = opened(cache)
    assert found[f"shards/{shard_name(0)}"] > 1 and found.keys() == files(cache).keys()


@pytest.mark.parametrize("fault", ["read twice", "read apart", "read with what lies between"])
def test_a_read_too_many_or_too_long_is_found(reader: CacheReader, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    real = reading._OpenFile.read_parts

    def read_parts(self: reading._OpenFile, some: list[tuple[int, memoryview]]) -> None:
        if fault == "read twice":
            real(self, some)
        elif fault == "read apart":
            for start, into in some:
                self.read(into, start)
            return
        else:
            first, last = min(start for start, _ in some), max(start + len(into) for start, into in some)
            self.read(memoryview(bytearray(last - first)), first)
        real(self, some)

    monkeypatch.setattr(reading._OpenFile, "read_parts", read_parts)
    needs = {*LATENTS, "text"}
    with reads() as sizes:
        examples = epoch(reader, needs)
    assert Counter(sizes) != Counter(expected(reader, examples, needs))


def test_threads_that_need_one_shard_open_it_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, second = list[int](), threading.Event()
    real = reading.LocalFiles._open

    def noted(self: reading.LocalFiles, shard: int) -> reading._OpenFile:
        opened.append(shard)
        if len(opened) > 1:
            second.set()
        second.wait(0.2)  # the first open is still running when the other thread asks
        return real(self, shard)

    monkeypatch.setattr(reading.LocalFiles, "_open", noted)
    files = reading.LocalFiles(cache)
    shard, together = next(iter(files.shards)), threading.Barrier(2)

    def read() -> None:
        together.wait()
        files.read([(shard, [(0, memoryview(bytearray(8)))])])

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [shard]
