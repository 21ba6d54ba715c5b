"""Reading a finished cache: exactly the bytes that an example needs, straight into the batch's tensors.

Thread safe; `preadv` releases the GIL. Opening refuses a cache that is unfinished, of another version, or
whose shards are missing or of another size than the manifest says.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator
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
from data_pipeline.shards import FOLDER, shard_name
from models.errors import CacheError, ConfigError

LATENTS = ("video_mean", "video_logvar", "mask_mean")
NEEDS = frozenset((*LATENTS, "text", "mask_pixels"))
_MAX_OPEN_FILES = 256


class CacheReader:
    """A finished cache, opened for reading by example id."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.index: NDArray[Any] = open_index(folder, rows=self.manifest.examples)
        self.dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        self.buckets: list[Bucket] = [bucket.counts() for bucket in self.manifest.buckets]
        self._check_sizes()
        self._files = _OpenFiles(folder / FOLDER)

    def _check_sizes(self) -> None:
        for shard in self.manifest.shards:
            path = self.folder / FOLDER / shard.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise CacheError(
                    f"{path}: missing from the cache ({error.strerror}); build the cache again"
                ) from error
            if size != shard.size:
                raise CacheError(
                    f"{path}: {size} bytes, the manifest says {shard.size}: the file is damaged; "
                    f"delete {self.folder} and build the cache again"
                )

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

        returns: of `needs`: video_mean, video_logvar, mask_mean [b 16 f h w] raw, stored dtype; text [b
        text_tokens D],
                 zeros after the last token, stored dtype; mask_pixels bool [b F H W]
        """
        assert set(needs) <= NEEDS, f"unknown needs {set(needs) - NEEDS}"
        rows = self.index[example_ids]
        bucket = self.manifest.buckets[int(rows[0]["bucket"])]
        assert (rows["bucket"] == rows[0]["bucket"]).all(), "a batch is of one bucket"
        batch: dict[str, Tensor] = {}
        shape = (len(rows), self.manifest.latent_channels, *bucket.latent_shape)
        for name in LATENTS:
            if name in needs:
                batch[name] = torch.empty(shape, dtype=self.dtype)
        if "text" in needs:
            batch["text"] = torch.zeros(len(rows), text_tokens, self.manifest.text_dim, dtype=self.dtype)
        if "mask_pixels" in needs:
            batch["mask_pixels"] = torch.empty(
                len(rows), bucket.frames, bucket.height, bucket.width, dtype=torch.bool
            )
        for place, row in enumerate(rows):
            self._read_row(row, {name: tensor[place] for name, tensor in batch.items()}, bucket=bucket)
        return batch

    def _read_row(self, row: Any, into: dict[str, Tensor], *, bucket: BucketEntry) -> None:
        with self._files.open(int(row["shard"])) as file:
            for name in LATENTS:
                if name in into:
                    _fill(file, int(row[name]), into[name])
            if "text" in into:
                offset, tokens = int(row["text"]), int(row["text_tokens"])
                if tokens > into["text"].shape[0]:
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
    def __init__(self, path: Path):
        self.path, self.users = path, 0
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CacheError(f"{path}: cannot be opened: {error.strerror}") from error

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

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, Lock()
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()

    @contextmanager
    def open(self, shard: int) -> Iterator[_OpenFile]:
        with self._lock:
            file = self._open.pop(shard, None) or _OpenFile(self._folder / shard_name(shard))
            self._open[shard] = file
            file.users += 1
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1
                if len(self._open) > _MAX_OPEN_FILES:
                    self._close_idle()

    def _close_idle(self) -> None:
        idle = [shard for shard, file in self._open.items() if not file.users]
        for shard in idle[: len(self._open) - _MAX_OPEN_FILES]:
            os.close(self._open.pop(shard).descriptor)

    def close(self) -> None:
        with self._lock:
            for file in self._open.values():
                os.close(file.descriptor)
            self._open.clear()
