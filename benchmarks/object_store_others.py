"""Three readers of the same examples from one server in one run: this repository's, mosaicml-streaming and litdata.

    python benchmarks/object_store_others.py --python VENV/bin/python [--json] [--clips N] [--rounds N] [--delay-ms MS]

VENV: an environment with torch, mosaicml-streaming and litdata (their numpy and transformers differ from ours).
Each clip is one example of 3.1 MB: latents of 16x5x60x104 (the video's mean and logvar, the mask's mean), a sentence.
Each reader has the format and defaults of its manual (shards of 64 MB, shuffled, batches of 8, a worker per core),
a new process and an empty disk, and reads every example once. Seconds: from the request of the first batch to the last
batch. `raw`: the requests of `ours` by 64 plain connections. Medians over interleaved rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

BATCH = 8
COLUMNS = dict.fromkeys(("video_mean", "video_logvar", "mask_mean"), (16, 5, 60, 104)) | {"text": (15, 4096)}
OTHERS = ("mosaicml", "litdata")


def prepare(folder: Path) -> None:
    """Write the examples of `examples.npy` in the formats of the other readers."""
    from litdata.streaming.cache import Cache
    from streaming import MDSWriter

    examples = np.load(folder / "examples.npy", mmap_mode="r")
    columns = {name: f"ndarray:int16:{','.join(map(str, shape))}" for name, shape in COLUMNS.items()}
    with MDSWriter(out=str(folder / "bucket/mosaicml"), columns=columns) as writer:
        for row in examples:
            writer.write(dict(_columns(row)))
    import torch

    cache = Cache(str(folder / "bucket/litdata"), chunk_bytes="64MB")
    for number, row in enumerate(examples):
        cache[number] = {name: torch.from_numpy(column.copy()) for name, column in _columns(row)}
    cache.done()
    cache.merge()


def _columns(row: "np.ndarray[Any, Any]") -> Iterable[tuple[str, Any]]:
    start = 0
    for name, shape in COLUMNS.items():
        stop = start + int(np.prod(shape))
        yield name, np.ascontiguousarray(row[start:stop]).reshape(shape)
        start = stop


def read(way: str, disk: Path, *, examples: int, workers: int) -> dict[str, float]:
    """Read every example once in this process; bytes, seconds, and seconds to the first batch."""
    loader: Any
    if way == "ours":
        loader = _ours(disk, examples=examples)
    elif way == "mosaicml":
        from streaming import StreamingDataLoader, StreamingDataset

        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        dataset = StreamingDataset(remote="s3://bucket/mosaicml", local=str(disk), shuffle=True, batch_size=BATCH)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)
    else:
        import litdata
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # this benchmark's server has no TLS
        dataset = litdata.StreamingDataset("s3://bucket/litdata", cache_dir=str(disk), shuffle=True)
        loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)
    started, first, done, count = perf_counter(), 0.0, 0, 0
    for batch in loader:
        first = first or perf_counter() - started
        done += sum(batch[name].nbytes for name in COLUMNS)
        count += len(batch["text"])
    seconds = perf_counter() - started
    assert count == examples, f"{way} gave {count} of {examples} examples"
    return {"bytes": done, "seconds": seconds, "first_s": first}


def _ours(disk: Path, *, examples: int) -> Iterable[dict[str, Any]]:
    """Batches of the trainer's loader, with its defaults."""
    from object_store import NEEDS, TEXT_TOKENS

    from flowmask.data_pipeline.config import LoaderConfig
    from flowmask.data_pipeline.read.batches import open_batches, open_reader, plan_for

    data = LoaderConfig(cache="s3://bucket/cache", local_cache=disk)
    reader = open_reader(data)
    plan = plan_for(reader, global_batch=BATCH, seed=1, remainder="carry")
    settings: dict[str, Any] = {"rank": 0, "world_size": 1, "micro_batch": BATCH, "text_tokens": TEXT_TOKENS}
    settings |= {"needs": NEEDS, "threads": data.threads, "prefetch_batches": data.prefetch_batches}

    def batches() -> Iterable[dict[str, Any]]:
        with open_batches(reader, plan, **settings) as steps:
            for _ in range(examples // BATCH):
                yield from ({name: getattr(batch, name) for name in NEEDS} for batch in next(steps))

    return batches()


def measure(folder: Path, *, python: str, clips: int, rounds: int, delay_ms: float, workers: int) -> dict[str, Any]:
    """MB/s of examples, and ratios of `ours` to each other reader, as medians of interleaved rounds."""
    from object_store import environment, raw, requests_of, server_of
    from synthetic_cache import write_cache

    from flowmask.data_pipeline.config import LoaderConfig
    from flowmask.data_pipeline.read.reader import CacheReader

    write_cache(folder / "bucket/cache", clips=clips, masks=1, sentences=1)
    reader = CacheReader(folder / "bucket/cache")
    tensors = (reader.read(np.array([i]), needs=set(COLUMNS), text_tokens=256) for i in range(clips))
    rows = [np.concatenate([batch[name].view(-1).view(_int16()).numpy() for name in COLUMNS]) for batch in tensors]
    np.save(folder / "examples.npy", np.stack(rows))
    del rows
    this = str(Path(__file__).resolve())
    subprocess.run([python, this, "--prepare", str(folder)], check=True)
    (folder / "examples.npy").unlink()
    rates: dict[str, list[float]] = {way: [] for way in ("raw", "ours", *OTHERS)}
    first: dict[str, list[float]] = {way: [] for way in ("ours", *OTHERS)}
    with server_of(folder, delay_ms=delay_ms) as port:
        os.environ |= environment(port)
        stored = LoaderConfig(cache="s3://bucket/cache", local_cache=folder / "disk/first")
        asked = requests_of(stored, count=clips)
        for _ in range(rounds):
            for way in rates:
                shutil.rmtree(folder / "disk", ignore_errors=True)
                (folder / "disk").mkdir()
                if way == "raw":
                    done, took, _ = raw(port, asked)
                    rates[way].append(done / took / 1e6)
                    continue
                command = [sys.executable if way == "ours" else python, this, "--read", way]
                command += ["--folder", str(folder / "disk"), "--clips", str(clips), "--workers", str(workers)]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found = json.loads(printed.splitlines()[-1])
                rates[way].append(found["bytes"] / found["seconds"] / 1e6)
                first[way].append(found["first_s"])
    figures: dict[str, Any] = {f"{way}_mb_s": round(statistics.median(found), 1) for way, found in rates.items()}
    for other in ("raw", *OTHERS):
        ratios = [a / b for a, b in zip(rates["ours"], rates[other], strict=True)]
        figures[f"ours_to_{other}"] = round(statistics.median(ratios), 3)
        figures[f"ours_to_{other}_of_each_round"] = [round(ratio, 3) for ratio in ratios]
    figures |= {f"{way}_first_batch_s": round(statistics.median(found), 2) for way, found in first.items()}
    figures["load"] = [round(load, 1) for load in os.getloadavg()]
    return figures


def _int16() -> Any:
    import torch

    return torch.int16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of the environment with the other two")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--clips", type=int, default=192, help="3.1 MB each; a multiple of 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delay-ms", type=float, default=20.0, help="before each answer of the server")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of each of the other two")
    parser.add_argument("--folder", type=Path, help="where the data goes for a while; default: a temporary folder")
    parser.add_argument("--read", choices=("ours", *OTHERS), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare is not None:
        prepare(given.prepare)
        return
    if given.read is not None:
        print(
            json.dumps(read(given.read, given.folder / given.read, examples=given.clips, workers=given.workers)),
            flush=True,
        )
        return
    if given.clips % BATCH:
        parser.error(f"--clips is {given.clips}; give a multiple of {BATCH}")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        way = {"python": given.python, "clips": given.clips, "rounds": given.rounds, "delay_ms": given.delay_ms}
        figures = measure(Path(folder), **way, workers=given.workers)
    for name, value in figures.items():
        print(f"{name:32} {value}", file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
