"""Batches from shards at a URL, opened by the webdataset library and read from front to back, without the index.

The order is StreamPlan's: shuffled within a window, and dependent on the number of ranks; a resume skips whole shards.
A shard that can't be read to its end is fetched again; after that it is an error: examples are never skipped.
"""

import os
import re
import shlex
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.cache.manifest import FILE, SHORT_TEXT, Manifest, parse_manifest
from flowmask.data_pipeline.cache.shards import FOLDER, tar_records, tensor_ranges
from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.read.buffers import Buffers
from flowmask.data_pipeline.read.loader import Batch, Steps
from flowmask.data_pipeline.read.reader import damaged_record, fill_masks, refuse_text_tokens, shapes_of
from flowmask.data_pipeline.read.stream_plan import EPOCH, ID, Items, StreamPlan, Window
from flowmask.models.errors import CacheError, ConfigError
from flowmask.models.stored.regular import open_regular

_CONNECT_S, _STALL_S = 30, 60  # seconds without data after which curl fails
# Curl's exit codes
_CURL = {6: "unknown host", 7: "connection refused", 18: "cut off in the middle", 22: "an HTTP error"}
_CURL |= {28: "silence", 52: "no answer", 56: "connection lost"}
_SCHEME = re.compile(r"[a-z0-9+]+:")
_PARTS = {"video_mean": "video.mean", "video_logvar": "video.logvar"}


@dataclass
class Example:
    """The data of one example from a record: parts of its bytes, and its JSON."""

    tensors: dict[str, memoryview]
    meta: dict[str, Any]
    expression: dict[str, Any]
    where: str


class StreamReader:
    """A finished cache at a URL (or in a folder), known only by its manifest."""

    def __init__(self, config: LoaderConfig, *, pin: bool = False):
        self.config, self.buffers = config, Buffers(pin=pin)
        place = self.place(FILE)
        try:
            with _open(place) as stream:
                content = stream.read()
        except OSError as error:
            raise CacheError(f"{place}: no cache can be read there ({_reason(error)}); check data.cache") from error
        self.manifest: Manifest = parse_manifest(content, where=place)
        self.dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        self.buckets: list[Bucket] = [bucket.counts() for bucket in self.manifest.buckets]

    def place(self, name: str) -> str:
        """Where a file of the cache is: `name` replaces {}, or follows the URL.

        A command runs in a shell, in which the name is one word; the manifest accepts only names of shards.
        """
        base = str(self.config.cache)
        name = shlex.quote(name) if base.startswith("pipe:") else name
        return base.replace("{}", name) if "{}" in base else f"{base.rstrip('/')}/{name}"

    def check_text_tokens(self, text_tokens: int) -> None:
        """ConfigError if some sentence is stored neither whole nor cut to this length."""
        refuse_text_tokens(self.manifest, text_tokens, where=self.config.cache)

    def read(self, *_: Any, **__: Any) -> NoReturn:
        """ConfigError: a stream has no random access."""
        raise ConfigError(
            f"data.mode is stream: single examples of {self.config.cache} can't be read; set evaluate.cache "
            "to a cache in a folder"
        )

    def plan(self, *, global_batch: int, seed: int) -> StreamPlan:
        size = self.config.shuffle_examples
        return StreamPlan(self.manifest, global_batch=global_batch, seed=seed, shuffle_examples=size)

    def close(self) -> None:
        """Nothing to close: between shards no file is open."""

    def fetch(self, shard: int, wanted: set[int], *, plan: StreamPlan) -> dict[int, Example]:
        """The wanted examples of a shard, by id; raises CacheError after the last retry."""
        place = self.place(f"{FOLDER}/{self.manifest.shards[shard].file}")
        found: dict[int, Example] = {}
        for attempt in range(self.config.retries + 1):
            reason = "it ends too early"
            try:
                for number, example in self._examples(place, shard, plan=plan):
                    if number in wanted:
                        found[number] = example
                    if len(found) == len(wanted):
                        return found
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = _reason(error)
            if attempt < self.config.retries:
                sleep(2**attempt)
        times = f"tried {self.config.retries + 1} times" if self.config.retries else "data.retries is 0"
        raise CacheError(f"{place}: cannot be read to its end ({reason}); {times}")

    def _examples(self, place: str, shard: int, *, plan: StreamPlan) -> Iterator[tuple[int, Example]]:
        """Every example of a shard with its id, in the order of the tar."""
        shapes = [(bucket.frames, bucket.height, bucket.width) for bucket in self.manifest.buckets]
        following = plan.first[shard].copy()
        with _open(place) as stream:
            for record in tar_records(stream, size=self.manifest.shards[shard].size):
                meta, content = record.meta, memoryview(record.tensors)
                ranges = tensor_ranges(record.tensors)
                tensors = {name: content[start:end] for name, (start, end) in ranges.items()}
                width, height = meta["size"]
                bucket = shapes.index((len(meta["frame_ids"]), height, width))
                for expression in meta["expressions"]:
                    where = f"{place}, record {record.key}"
                    yield int(following[bucket]), Example(tensors, meta, expression, where)
                    following[bucket] += 1

    def tensors(
        self, examples: list[Example], *, bucket: int, needs: Collection[str], text_tokens: int
    ) -> dict[str, Tensor]:
        """Tensors [b ...] of examples of one bucket, as from `CacheReader.read`."""
        entry = self.manifest.buckets[bucket]
        row = self.manifest.text_dim * self.dtype.itemsize
        texts = [self._text(example, text_tokens) for example in examples] if "text" in needs else []
        tokens = max((len(text) // row for text in texts), default=0)
        batch = self.buffers.tensors(
            shapes_of(self.manifest, entry, examples=len(examples), tokens=tokens, needs=needs)
        )
        for place, example in enumerate(examples):
            with damaged_record(example.where):
                mask = example.expression["mask"]
                parts = {**_PARTS, "mask_mean": f"mask.{mask}.mean"}
                for name in set(parts) & set(batch):
                    _copy(example.tensors[parts[name]], batch[name][place], where=example.where)
                if texts:
                    batch["text"][place].zero_()
                    _copy(texts[place], batch["text"][place], where=example.where, padded=True)
                if "mask_pixels" in batch:
                    fill_masks(batch, place, example.meta["masks"][mask], bucket=entry, where=example.where)
        return batch

    def _text(self, example: Example, text_tokens: int) -> memoryview:
        with damaged_record(example.where):
            name = f"text.{example.expression['text_id']}"
            whole = example.tensors[name]
            too_long = len(whole) > text_tokens * self.manifest.text_dim * self.dtype.itemsize
            return example.tensors[f"{name}.t{SHORT_TEXT}"] if too_long else whole


class StreamLoader(Steps):
    """As `Loader`, for streams: a window is read while the previous one is used."""

    def __init__(
        self,
        reader: StreamReader,
        plan: StreamPlan,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        threads: int = 2,
        **rest: Any,
    ):
        super().__init__(reader, seed=plan.seed, **rest)
        self.reader, self.plan = reader, plan
        plan.share(rank=rank, world_size=world_size, micro_batch=micro_batch)
        self._windows = plan.windows(self.step)
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="stream")
        self._next, self._coming = self._order({})
        self._window = Window([], np.empty((0, 3), np.int64))
        self._held: dict[int, Example] = {}

    def _order(self, held: dict[int, Example]) -> tuple[Window, list[Future[dict[int, Example]]]]:
        """Request the shards of the next window, except examples that are already in memory."""
        window = next(self._windows)
        asked = {shard: ids - held.keys() for shard, ids in window.wanted().items()}
        return window, [
            self._pool.submit(self.reader.fetch, shard, ids, plan=self.plan) for shard, ids in asked.items() if ids
        ]

    def batches(self) -> list[Batch]:
        return [self._one(place) for place in range(self.plan.accumulation)]

    def _one(self, place: int) -> Batch:
        began = perf_counter()
        if not self._window.batches:
            self._advance()
        bucket, items = self._window.batches.pop(0)
        return self._batch(bucket, items, place, began=began)

    def _advance(self) -> None:
        """Wait for the examples of the next window, and request the one after it."""
        self._window, coming = self._next, self._coming
        kept = set(self._window.carried[:, ID].tolist())
        kept.update(number for _, items in self._window.batches for number in items[:, ID].tolist())
        held = {number: example for number, example in self._held.items() if number in kept}
        for future in coming:
            held |= future.result()
        self._held = held
        self._next, self._coming = self._order({n: held[n] for n in self._window.carried[:, ID].tolist()})

    def _batch(self, bucket: int, items: Items, place: int, *, began: float) -> Batch:
        held = [self._held[number] for number in items[:, ID].tolist()]
        tensors = self.reader.tensors(held, bucket=bucket, needs=self.needs, text_tokens=self.text_tokens)
        first = (self.plan.rank * self.plan.accumulation + place) * self.plan.micro_batch
        ids, epochs = items[:, ID], items[:, EPOCH]
        return self.batch(tensors, step=self.step, first=first, ids=ids, epochs=epochs, began=began)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._held.clear()


@contextmanager
def _open(place: str) -> Iterator[Any]:
    """A stream of webdataset's, or a file; http(s) through curl with a timeout.

    OSError when it ends if its command failed, unless the reader stopped before the end.
    """
    from webdataset.gopen import gopen

    if place.startswith(("http://", "https://")):
        options = f"-f -s -L --connect-timeout {_CONNECT_S} --speed-limit 1 --speed-time {_STALL_S}"
        place = f"pipe:curl {options} {shlex.quote(place)}"
    local = place.removeprefix("file:")
    stream = gopen(place) if _SCHEME.match(local) else os.fdopen(open_regular(Path(local), inside=_home(local)), "rb")
    try:
        yield stream
    except GeneratorExit:
        with suppress(OSError):  # the command fails because its reader has closed
            stream.close()
        raise
    except BaseException:
        stream.close()
        raise
    else:
        stream.close()


def _home(local: str) -> Path:
    """The folder of the cache that a file belongs to."""
    folder = Path(local).parent
    return folder.parent if folder.name == FOLDER else folder


def _copy(content: memoryview, into: Tensor, *, where: str, padded: bool = False) -> None:
    target = into.view(torch.uint8).numpy().reshape(-1)
    if len(content) != target.nbytes and not (padded and len(content) < target.nbytes):
        raise CacheError(f"{where}: a tensor of {len(content)} bytes where {target.nbytes} were expected")
    target[: len(content)] = np.frombuffer(content, np.uint8)


def _reason(error: Exception) -> str:
    """The reason in one line; a command's exit code has more detail than the error of the truncated tar."""
    message = " ".join(str(getattr(error, "strerror", None) or (error.args or ("",))[0]).split())
    ended = re.search(r"exit (\d+) \(read\)", message)
    if ended is None:
        return message[:200] or type(error).__name__
    code = int(ended[1])
    meaning = f", {_CURL[code]}" if "curl" in message and code in _CURL else ""
    return f"its command ended with exit code {code}{meaning}"
