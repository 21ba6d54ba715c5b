"""How fast a cache is read, in useful MB/s: only bytes of the tensors that examples need count.

    python benchmarks/loader.py [--json] [--clips N] [--rounds N] [--folder DIR]

Latents of the full size (16x5x60x104), two masks and three sentences of 15 tokens a clip, warm page cache, a global
shuffle in every reader, median over interleaved rounds. `ours.trainer` is the trainer's loader with its default
threads, and the needs and `prepare` of the flow-matching objective. `webdataset` decodes one record per example, as
an equally good shuffle must. `torch_load` has one file per example. `raw_read` reads the same number of bytes into
one buffer.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from synthetic_cache import LATENT, write_cache

from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read.epoch_plan import EpochPlan
from flowmask.data_pipeline.read.loader import Batch, Loader
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.models.config import ModelConfig
from flowmask.models.vae import LatentStats
from flowmask.trainer.objectives import objective_named, section

GLOBAL_BATCH, TEXT_TOKENS = 8, 256


class Readers:
    """The ways to read `count` examples; each method returns its useful bytes."""

    def __init__(self, folder: Path, *, count: int):
        self.cache, self.count = folder / "cache", count
        self.reader = CacheReader(self.cache)
        self.plan = EpochPlan(self.reader.buckets, global_batch=GLOBAL_BATCH, seed=1)
        stats = LatentStats.from_lists(self.reader.manifest.latents_mean, self.reader.manifest.latents_std)
        self.objective = objective_named(section(), model=ModelConfig(wan=Path()), stats=stats)
        self.files = self._write_files(folder / "files")
        paths = sorted((self.cache / "shards").glob("*.tar"))
        self.shards = [path.open("rb", buffering=0) for path in paths]
        size = 3 * 2 * int(np.prod(LATENT)) + 2 * 15 * 4096
        self.buffer, self.example_bytes = bytearray(size), size
        self.shuffle = random.Random(1)

    def _write_files(self, folder: Path) -> list[Path]:
        """One torch file for each of `count` examples, at most one a clip."""
        folder.mkdir()
        files = []
        for number in range(min(self.count, self.reader.manifest.clips)):
            tensors = self.reader.read(np.array([number]), needs=self.objective.needs, text_tokens=TEXT_TOKENS)
            files.append(folder / f"{number}.pt")
            torch.save({name: tensor[0].clone() for name, tensor in tensors.items()}, files[-1])
        return files

    def trainer(self) -> int:
        return self._ours(LoaderConfig(cache=self.cache).threads)

    def threads_0(self) -> int:
        return self._ours(0)

    def _ours(self, threads: int) -> int:
        def prepare(batch: Batch) -> Batch:
            return self.objective.prepare(batch).to("cpu")

        loader = Loader(
            self.reader,
            self.plan,
            rank=0,
            world_size=1,
            micro_batch=1,
            needs=self.objective.needs,
            text_tokens=TEXT_TOKENS,
            prepare=prepare,
            threads=threads,
            prefetch_batches=LoaderConfig(cache=self.cache).prefetch_batches,
        )
        done = 0
        with loader:
            for _ in range(self.count // GLOBAL_BATCH):
                for batch in next(loader):
                    done += sum(t.nbytes for t in (batch.video_mean, batch.video_logvar, batch.mask_mean))  # type: ignore[union-attr]
                    done += batch.text.nbytes  # type: ignore[union-attr]
        return done

    def webdataset(self) -> int:
        import webdataset

        paths = sorted(str(path) for path in (self.cache / "shards").glob("*.tar"))
        self.shuffle.shuffle(paths)
        done = emitted = 0
        while emitted < self.count:
            for sample in webdataset.WebDataset(paths, shardshuffle=False).map(self._one_example):
                done, emitted = done + sum(t.nbytes for t in sample), emitted + 1
                if emitted == self.count:
                    break
        return done

    def _one_example(self, sample: dict[str, bytes]) -> list[torch.Tensor]:
        tensors, record = load(sample["safetensors"]), json.loads(sample["json"])
        said = self.shuffle.choice(record["expressions"])
        names = ("video.mean", "video.logvar", f"mask.{said['mask']}.mean", f"text.{said['text_id']}")
        return [tensors[name] for name in names]

    def torch_load(self) -> int:
        done = 0
        for path in self.shuffle.choices(self.files, k=self.count):
            done += sum(t.nbytes for t in torch.load(path, weights_only=True).values())
        return done

    def raw_read(self) -> int:
        done = 0
        rows = self.reader.index[[self.shuffle.randrange(len(self.reader.index)) for _ in range(self.count)]]
        for row in rows:
            file = self.shards[int(row["shard"])]
            file.seek(int(row["video_mean"]))
            done += file.readinto(self.buffer)
        return done

    def parts_ms(self) -> dict[str, float]:
        """Milliseconds an example of the work in and after the loader, each part alone, in one thread."""
        plan = [np.array([i], np.int64) for i in self.shuffle.sample(range(len(self.reader.index)), 64)]
        keys = list(range(64))
        empty = torch.empty(0)
        batches: list[Batch] = []

        def read() -> None:
            batches.clear()
            for ids, key in zip(plan, keys, strict=True):
                tensors: dict[str, Any] = self.reader.read(ids, needs=self.objective.needs, text_tokens=TEXT_TOKENS)
                batches.append(Batch(0, empty, empty, empty, [key], 0, **tensors))

        steps = {
            "read": read,
            "prepare": lambda: [self.objective.prepare(batch) for batch in batches],
            "noise_in_the_step": lambda: [self.objective.noise(batch) for batch in batches],  # type: ignore[attr-defined]
        }
        return {name: round(1e3 * _seconds(step) / 64, 3) for name, step in steps.items()}


def _seconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        started = perf_counter()
        call()
        times.append(perf_counter() - started)
    return min(times)


def measure(folder: Path, *, clips: int, rounds: int, count: int) -> dict[str, Any]:
    """Medians in useful MB/s over interleaved rounds; the first round only warms the page cache."""
    write_cache(folder / "cache", clips=clips)
    readers = Readers(folder, count=count)
    ways = ("raw_read", "trainer", "threads_0", "webdataset", "torch_load")
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in ways:
            started = perf_counter()
            done = getattr(readers, way)()
            if number:
                rates[way].append(done / (perf_counter() - started) / 1e6)
    median = {way: round(statistics.median(values), 1) for way, values in rates.items()}
    ours = {way: median.pop(way) for way in ("trainer", "threads_0")}
    ratios = {
        "trainer_to_raw": round(ours["trainer"] / median["raw_read"], 3),
        "trainer_to_webdataset": round(ours["trainer"] / median["webdataset"], 3),
    }
    return {"ours": ours, **median, **ratios, "ms_an_example": readers.parts_ms()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--clips", type=int, default=192, help="4.4 MB each, and 3.1 MB for torch_load")
    parser.add_argument("--count", type=int, default=512, help="examples read in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the data goes for a while; default: a temporary folder")
    parser.add_argument("--shards", type=int, default=10_000, help="start-up: shards of the cache")
    parser.add_argument("--examples", type=int, default=10_000_000, help="start-up: examples of the cache")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        figures = measure(Path(folder), clips=given.clips, rounds=given.rounds, count=given.count)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        figures |= start_up(Path(folder), shards=given.shards, examples=given.examples)
    for name, value in figures.items():
        print(f"{name:22} {value}", file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps(figures))


def start_up(folder: Path, *, shards: int, examples: int) -> dict[str, Any]:
    """Seconds and memory from opening a large cache to the first batch, in a separate process."""
    import subprocess

    from synthetic_cache import write_large_cache

    write_large_cache(folder / "cache", shards=shards, examples=examples)
    script = Path(__file__).with_name("loader_start.py")
    command = [sys.executable, str(script), str(folder / "cache")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [
        json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(3)
    ]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


if __name__ == "__main__":
    main()
