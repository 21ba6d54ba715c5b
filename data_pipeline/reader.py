"""Reading a finished cache: exactly the bytes that an example needs, straight into the batch's tensors.

Thread safe; `preadv` releases the GIL. Opening refuses a cache that is unfinished or of another version. A
shard that is missing or of another size than the manifest says is refused when it is first opened, and all of
them at the start by whoever asks for it: one process of a run, so that 1,000 ranks don't stat every shard.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline import rle
from data_pipeline.epoch_plan import Bucket
from data_pipeline.index import open_index
from data_pipeline.manifest import LONG_TEXT, SHORT_TEXT, BucketEntry, Manifest, read_manifest
from data_pipeline.shards import FOLDER, shard_name, shard_number
from models.errors import CacheError, ConfigError

LATENTS = ("video_mean", "video_logvar", "mask_mean")
NEEDS = frozenset((*LATENTS, "text", "mask_pixels"))
_MAX_OPEN_FILES = 256
_CHECKING_THREADS = 8


class CacheReader:
    """A finished cache, opened for reading by example id.

    What training needs of a reader, also of one that presents several caches as one: `buckets`, `manifest`,
    `read`, `record`, `bucket_of`, `check_text_tokens`, `close`; nothing else.
    check: look at every shard's size now, not only when it is first read. pin: read into page-locked memory.
    """

    def __init__(self, folder: Path, *, check: bool = True, pin: bool = False):
        self.folder, self._pin = folder, pin
        self.manifest: Manifest = read_manifest(folder)
        self.index: NDArray[Any] = open_index(folder, rows=self.manifest.examples)
        self.dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        self.buckets: list[Bucket] = [bucket.counts() for bucket in self.manifest.buckets]
        self._files = _OpenFiles(folder, self.manifest)
        if check:
            with ThreadPoolExecutor(_CHECKING_THREADS) as pool:  # a shared filesystem answers many at once
                for _ in pool.map(self._files.check, range(len(self.manifest.shards)), chunksize=64):
                    pass

    def check_text_tokens(self, text_tokens: int) -> None:
        """ConfigError if some sentence is stored neither whole nor cut to this length."""
        longest = self.manifest.longest_text_tokens
        if text_tokens < longest and text_tokens != SHORT_TEXT:
            raise ConfigError(
                f"model.text_tokens is {text_tokens}, but {self.folder} has a sentence of {longest} tokens, and "
                f"stores long ones cut to {SHORT_TEXT} and {LONG_TEXT} only: use one of these, or {longest}"
            )

    def bucket_of(self, example_id: int) -> BucketEntry:
        return self.manifest.buckets[int(self.index[example_id]["bucket"])]

    def read(
        self, example_ids: NDArray[np.integer], *, needs: Collection[str], text_tokens: int
    ) -> dict[str, Tensor]:
        """Tensors of examples of one bucket.

        returns: of `needs`: video_mean, video_logvar, mask_mean [b 16 f h w] raw, stored dtype; text [b L D],
                 stored dtype, L the most tokens of these examples (at most text_tokens), zeros after a
                 shorter one's last; mask_pixels bool [b F H W]
        """
        assert set(needs) <= NEEDS, f"unknown needs {set(needs) - NEEDS}"
        rows = self.index[example_ids]
        bucket = self.manifest.buckets[int(rows[0]["bucket"])]
        assert (rows["bucket"] == rows[0]["bucket"]).all(), "a batch is of one bucket"
        batch: dict[str, Tensor] = {}
        shape = (len(rows), self.manifest.latent_channels, *bucket.latent_shape)
        for name in LATENTS:
            if name in needs:
                batch[name] = torch.empty(shape, dtype=self.dtype, pin_memory=self._pin)
        if "text" in needs:
            whole = rows["text_tokens"] <= text_tokens
            longest = int(np.where(whole, rows["text_tokens"], rows["short_text_tokens"]).max())
            size = (len(rows), longest, self.manifest.text_dim)
            batch["text"] = torch.zeros(size, dtype=self.dtype, pin_memory=self._pin)
        if "mask_pixels" in needs:
            frames = (len(rows), bucket.frames, bucket.height, bucket.width)
            batch["mask_pixels"] = torch.empty(frames, dtype=torch.bool, pin_memory=self._pin)
        for place, row in enumerate(rows):
            into = {name: tensor[place] for name, tensor in batch.items()}
            self._read_row(row, into, bucket=bucket, text_tokens=text_tokens)
        return batch

    def _read_row(self, row: Any, into: dict[str, Tensor], *, bucket: BucketEntry, text_tokens: int) -> None:
        with self._files.open(int(row["shard"])) as file:
            for name in LATENTS:
                if name in into:
                    _fill(file, int(row[name]), into[name])
            if "text" in into:
                offset, tokens = int(row["text"]), int(row["text_tokens"])
                if tokens > text_tokens:
                    offset, tokens = int(row["short_text"]), int(row["short_text_tokens"])
                _fill(file, offset, into["text"][:tokens])
            if "mask_pixels" in into:
                content = bytearray(int(row["record_length"]))
                file.read(memoryview(content), int(row["record"]))
                frames = json.loads(content)["masks"][int(row["mask"])]["rle"]
                size = (bucket.height, bucket.width)
                masks = [
                    rle.decode(frame, size=size, where=f"{file.path}, mask {row['mask']}") for frame in frames
                ]
                into["mask_pixels"].copy_(torch.from_numpy(np.stack(masks)))

    def record(self, example_id: int) -> dict[str, Any]:
        """The record's JSON: video id, frames, crop, masks as RLE and expressions of the example's clip."""
        row = self.index[example_id]
        content = bytearray(int(row["record_length"]))
        with self._files.open(int(row["shard"])) as file:
            file.read(memoryview(content), int(row["record"]))
        return json.loads(content)

    def close(self) -> None:
        self._files.close()


def _fill(file: "_OpenFile", offset: int, tensor: Tensor) -> None:
    """Read a contiguous tensor's bytes in place."""
    file.read(tensor.view(torch.uint8).numpy().data.cast("B"), offset)


class _OpenFile:
    def __init__(self, path: Path, *, size: int):
        self.path, self.users = path, 0
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            _check_size(path, os.fstat(self.descriptor).st_size, expected=size)
        except CacheError:
            os.close(self.descriptor)
            raise

    def read(self, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self.descriptor, [into[done:]], offset + done)
            except OSError as error:
                raise CacheError(f"{self.path}: cannot be read: {error.strerror}") from error
            if not count:
                raise CacheError(f"{self.path}: ends before byte {offset + len(into)}: the file was cut")
            done += count


class _OpenFiles:
    """The shards used last, kept open: at most _MAX_OPEN_FILES that nobody reads at this moment."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder, self._lock = folder / FOLDER, Lock()
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._numbers = [shard_number(shard.file) for shard in manifest.shards]
        self._sizes = dict(zip(self._numbers, (shard.size for shard in manifest.shards), strict=True))

    def check(self, place: int) -> None:
        """CacheError unless the manifest's shard at this place is there, of the right size."""
        number = self._numbers[place]
        path = self._folder / shard_name(number)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise _unreadable(path, error) from error
        _check_size(path, size, expected=self._sizes[number])

    @contextmanager
    def open(self, shard: int) -> Iterator[_OpenFile]:
        with self._lock:
            file = self._open.pop(shard, None) or self._open_file(shard)
            self._open[shard] = file
            file.users += 1
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1
                if len(self._open) > _MAX_OPEN_FILES:
                    self._close_idle()

    def _open_file(self, shard: int) -> _OpenFile:
        path = self._folder / shard_name(shard)
        if shard not in self._sizes:
            raise CacheError(f"{path}: the index names it, the manifest doesn't; build the cache again")
        return _OpenFile(path, size=self._sizes[shard])

    def _close_idle(self) -> None:
        idle = [shard for shard, file in self._open.items() if not file.users]
        for shard in idle[: len(self._open) - _MAX_OPEN_FILES]:
            os.close(self._open.pop(shard).descriptor)

    def close(self) -> None:
        with self._lock:
            for file in self._open.values():
                os.close(file.descriptor)
            self._open.clear()


def _unreadable(path: Path, error: OSError) -> CacheError:
    if isinstance(error, FileNotFoundError):
        return CacheError(f"{path}: missing from the cache; run `flowmask cache repair {path.parents[1]}`")
    return CacheError(f"{path}: cannot be opened: {error.strerror}")


def _check_size(path: Path, size: int, *, expected: int) -> None:
    if size != expected:
        raise CacheError(
            f"{path}: {size} bytes, the manifest says {expected}: the file is damaged; "
            f"run `flowmask cache repair {path.parents[1]}`"
        )
