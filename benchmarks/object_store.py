"""How fast a cache in an object store is read, as ratios to the raw speed of the same server.

    python benchmarks/object_store.py [--json] [--clips N] [--count N] [--rounds N] [--delay-ms MS] [--line-mb-s N]
        [--folder DIR]

The server is a separate process on this machine. It answers ranges of files as S3 does, each after the delay, and all
together at most at the line's rate. Without a rate its own work is the limit, on cores that the client shares.
Latents have their full size (16x5x60x104). `cold` is the trainer's loader with an empty disk, `warm` uses the disk
after `cold`, `folder` is the same loader on the folder, each timed after its reader is opened. `raw` requests the
ranges of `cold` by 64 plain connections, and discards the bytes. MB/s count these bytes for `raw` and `cold`, and all
bytes of the examples for `warm` and `folder` (sentences of a clip share its video). Medians over interleaved rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, local
from time import perf_counter, process_time, sleep
from typing import Any

from synthetic_cache import write_cache

from flowmask.data_pipeline.cache.objects import ByteRange, ObjectStore
from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read.batches import open_batches, open_reader, plan_for

GLOBAL_BATCH, TEXT_TOKENS, CONNECTIONS = 8, 256, 64
PIECE = 1 << 18  # bytes of an answer that the line carries at once
NEEDS = ("video_mean", "video_logvar", "mask_mean", "text")


class Line:
    """A network connection that all answers share."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s, self._free_at, self._lock = bytes_per_s, 0.0, Lock()

    def carry(self, length: int) -> None:
        """Return when the line has carried `length` bytes more."""
        with self._lock:
            self._free_at = max(self._free_at, perf_counter()) + length / self._bytes_per_s
            until = self._free_at
        sleep(max(0.0, until - perf_counter()))


def serve(folder: Path, *, delay_s: float, line: Line | None) -> None:
    """Answer GET with and without a range, and a listing, until this process is ended."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            sleep(delay_s)
            if "?" in self.path:
                listing = _listing(folder)
                self._answer(200, len(listing))
                self.wfile.write(listing)
                return
            with (folder / self.path.lstrip("/")).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start, stop = 0, size
                if asked := self.headers.get("Range"):
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    start, stop = int(first), min(int(last) + 1, size) if last else size
                self._answer(206 if asked else 200, stop - start, range_of=f"bytes {start}-{stop - 1}/{size}")
                while start < stop and self.command == "GET":
                    most = min(PIECE, stop - start) if line else stop - start
                    sent = os.sendfile(self.connection.fileno(), file.fileno(), start, most)
                    start += sent
                    if line:
                        line.carry(sent)

        def do_HEAD(self) -> None:
            self.do_GET()

        def _answer(self, status: int, length: int, *, range_of: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.send_header("ETag", '"unchanged"')
            if status == 206:
                self.send_header("Content-Range", range_of)
            self.end_headers()

    ThreadingHTTPServer.request_queue_size = 2 * CONNECTIONS
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def _listing(folder: Path) -> bytes:
    """A bucket's shards, as S3 lists them."""
    entries = "".join(
        f"<Contents><Key>{path.relative_to(folder / 'bucket')}</Key><Size>{path.stat().st_size}</Size>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for path in sorted((folder / "bucket/cache/shards").glob("*.tar"))
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()


@contextmanager
def server_of(folder: Path, *, delay_ms: float, line_mb_s: float = 0) -> Iterator[int]:
    """The port of `serve` in a separate process."""
    limits = ["--delay-ms", str(delay_ms), "--line-mb-s", str(line_mb_s)]
    command = [sys.executable, __file__, "--serve", str(folder), *limits]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def ours(data: LoaderConfig, *, count: int) -> tuple[int, float, float]:
    """Read `count` examples by the trainer's loader; bytes, seconds, and CPU seconds of this process."""
    reader = open_reader(data)
    started, busy = perf_counter(), process_time()
    plan, done = plan_for(reader, global_batch=GLOBAL_BATCH, seed=1, remainder="carry"), 0
    settings: dict[str, Any] = {"rank": 0, "world_size": 1, "micro_batch": 1, "text_tokens": TEXT_TOKENS}
    settings |= {"needs": NEEDS, "threads": data.threads, "prefetch_batches": data.prefetch_batches}
    with open_batches(reader, plan, **settings) as batches:
        for _ in range(count // GLOBAL_BATCH):
            done += sum(getattr(batch, name).nbytes for batch in next(batches) for name in NEEDS)
        taken = perf_counter() - started, process_time() - busy
    reader.close()
    return done, *taken


def requests_of(data: LoaderConfig, *, count: int) -> list[ByteRange]:
    """The ranges that `ours` requests from the server."""
    asked: list[ByteRange] = []
    real = ObjectStore.ranges

    def noted(self: ObjectStore, wanted: Sequence[ByteRange], then: Any) -> list[Any]:
        asked.extend(one for one in wanted if one.name.endswith(".tar"))
        return real(self, wanted, then)

    ObjectStore.ranges = noted  # type: ignore[method-assign]
    ours(data, count=count)
    ObjectStore.ranges = real  # type: ignore[method-assign]
    return asked


def environment(port: int) -> dict[str, str]:
    """The variables by which any S3 client of this machine finds the server."""
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_EC2_METADATA_DISABLED": "true"}
    return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1", **keys}


def raw(port: int, wanted: Sequence[ByteRange]) -> tuple[int, float, float]:
    """The requests of `ours` over plain connections."""
    own = local()
    started, busy = perf_counter(), process_time()

    def get(one: ByteRange) -> int:
        if not hasattr(own, "connection"):
            own.connection, own.memory = HTTPConnection("127.0.0.1", port), bytearray(16 << 20)
        own.connection.request(
            "GET", f"/bucket/cache/{one.name}", headers={"Range": f"bytes={one.start}-{one.stop - 1}"}
        )
        answer, done = own.connection.getresponse(), 0
        while got := answer.readinto(own.memory):
            done += got
        return done

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        done = sum(pool.map(get, wanted))
        return done, perf_counter() - started, process_time() - busy


def measure(folder: Path, *, clips: int, count: int, rounds: int, delay_ms: float, line_mb_s: float) -> dict[str, Any]:
    """Medians over interleaved rounds; a first, uncounted read records the requests of `cold`."""
    write_cache(folder / "bucket/cache", clips=clips)
    rates: dict[str, list[float]] = {way: [] for way in ("raw", "cold", "warm", "folder")}
    cpu: dict[str, list[float]] = {way: [] for way in rates}
    with server_of(folder, delay_ms=delay_ms, line_mb_s=line_mb_s) as port:
        os.environ |= environment(port)
        stored = LoaderConfig(cache="s3://bucket/cache", local_cache=folder / "disk")
        asked = requests_of(stored, count=count)
        for _ in range(rounds):
            for way in rates:
                if way == "cold":
                    shutil.rmtree(folder / "disk")
                read = LoaderConfig(cache=folder / "bucket/cache") if way == "folder" else stored
                done, took, busy = raw(port, asked) if way == "raw" else ours(read, count=count)
                if way == "cold":
                    done = sum(one.stop - one.start for one in asked)
                rates[way].append(done / took / 1e6)
                cpu[way].append(busy / count * 1e3)
    figures: dict[str, Any] = {way: round(statistics.median(found), 1) for way, found in rates.items()}
    ratios = [cold / bare for cold, bare in zip(rates["cold"], rates["raw"], strict=True)]
    figures["cold_to_raw"] = round(statistics.median(ratios), 3)
    figures["cold_to_raw_of_each_round"] = [round(ratio, 3) for ratio in ratios]
    figures["warm_to_folder"] = round(statistics.median(rates["warm"]) / statistics.median(rates["folder"]), 3)
    figures["cpu_ms_an_example"] = {way: round(statistics.median(found), 2) for way, found in cpu.items()}
    figures["requests_an_example"] = round(len(asked) / count, 2)
    figures["mb_a_request"] = round(statistics.mean(one.stop - one.start for one in asked) / 1e6, 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--clips", type=int, default=96, help="4.4 MB each")
    parser.add_argument("--count", type=int, default=256, help="examples read in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delay-ms", type=float, default=20.0, help="before each answer of the server")
    parser.add_argument("--line-mb-s", type=float, default=0.0, help="what the server sends at most; 0: no limit")
    parser.add_argument("--folder", type=Path, help="where the data goes for a while; default: a temporary folder")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve, delay_s=given.delay_ms / 1e3, line=Line(given.line_mb_s * 1e6) if given.line_mb_s else None)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        sizes = {name: getattr(given, name) for name in ("clips", "count", "rounds", "delay_ms", "line_mb_s")}
        figures = measure(Path(folder), **sizes)
    for name, value in figures.items():
        print(f"{name:26} {value}", file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
