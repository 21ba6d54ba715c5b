"""Reading a finished cache: exactly the bytes that an example needs, straight into the batch's tensors.

Thread safe; `preadv` releases the GIL. Opening refuses a cache that is unfinished or of another version. A
shard that is missing or of another size than the manifest says is refused when it is first opened, and all of
them at the start with `check`, as is an index of another hash: in one process of a run, so that 1,000 ranks don't
read every shard's size. What the index says is read only where it lies in a shard and is of the manifest's buckets.
"""

import os
import stat
import weakref
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.cache.index import ROW, open_index
from flowmask.data_pipeline.cache.manifest import LONG_TEXT, SHORT_TEXT, BucketEntry, Manifest, read_manifest
from flowmask.data_pipeline.cache.shards import FOLDER, shard_name, shard_number
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.read.buffers import Buffers, Wanted
from flowmask.models.errors import CacheError, ConfigError
from flowmask.models.stored.regular import open_regular, refuse_outside
from flowmask.models.stored.sealed import parse_object

LATENTS = ("video_mean", "video_logvar", "mask_mean")
FROM_JSON = ("mask_pixels", "annotated")
NEEDS = frozenset((*LATENTS, "text", "mask_pixels"))
_MAX_OPEN_FILES = 256
_CHECKING_THREADS = 8


class CacheReader:
    """A finished cache, opened for reading by example id.

    What training needs of a reader, also of one that presents several caches as one: `buckets`, `manifest`,
    `read`, `record`, `bucket_of`, `check_text_tokens`, `close`; nothing else.
    check: look at the index's hash and every shard's size now; without it, at a shard's size when it is first read.
    pin: read into page-locked memory.
    """

    def __init__(self, folder: Path, *, check: bool = True, pin: bool = False):
        self.folder, self._buffers = folder, Buffers(pin=pin)
        self.manifest: Manifest = read_manifest(folder)
        self.index: NDArray[Any] = open_index(folder, self.manifest.index, rows=self.manifest.examples, check=check)
        self.dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        self.buckets: list[Bucket] = [bucket.counts() for bucket in self.manifest.buckets]
        self._files = _OpenFiles(folder, self.manifest)
        if check:
            self._files.check()

    def check_text_tokens(self, text_tokens: int) -> None:
        """ConfigError if some sentence is stored neither whole nor cut to this length."""
        refuse_text_tokens(self.manifest, text_tokens, where=self.folder)

    def bucket_of(self, example_id: int) -> BucketEntry:
        return self._bucket(self.index[example_id][None])

    def _bucket(self, rows: NDArray[Any]) -> BucketEntry:
        """The one bucket of rows of the index."""
        number = int(rows[0]["bucket"])
        if number >= len(self.manifest.buckets) or (rows["bucket"] != number).any():
            raise CacheError(f"{self.folder}: the index has examples of another bucket than the manifest says")
        return self.manifest.buckets[number]

    def read(self, example_ids: NDArray[np.integer], *, needs: Collection[str], text_tokens: int) -> dict[str, Tensor]:
        """Tensors of examples [b] of one bucket.

        returns: of `needs`: video_mean, video_logvar, mask_mean [b 16 f h w] raw, stored dtype; text [b L D],
                 stored dtype, L the most tokens of these examples (at most text_tokens), zeros after a
                 shorter one's last; mask_pixels bool [b F H W], and annotated bool [b F] where a cache has
                 clips of which some frames are not
        """
        assert set(needs) <= NEEDS, f"unknown needs {set(needs) - NEEDS}"
        rows = self.index[example_ids]
        bucket = self._bucket(rows)
        whole = rows["text_tokens"] <= text_tokens
        short = rows["short_text_tokens"]
        longest = int(np.where(whole, rows["text_tokens"], short).max())
        if rows["text_tokens"].max() > self.manifest.longest_text_tokens or short.max() > SHORT_TEXT:
            raise CacheError(f"{self.folder}: the index has a text that is longer than the manifest's longest")
        batch = self._buffers.tensors(shapes_of(self.manifest, bucket, examples=len(rows), tokens=longest, needs=needs))
        memory = {name: _bytes(tensor) for name, tensor in batch.items() if name not in FROM_JSON}
        for place, values in enumerate(rows.tolist()):
            row = dict(zip(ROW.names or (), values, strict=True))
            parts = self._parts(row, memory, place=place, examples=len(rows), text_tokens=text_tokens)
            file = self._files.open(row["shard"])
            file.read_parts(parts)
            if "mask_pixels" in batch:
                fill_masks(batch, place, _mask_of(file, row), bucket=bucket, where=f"{file.path}, mask {row['mask']}")
        return batch

    def _parts(
        self, row: dict[str, int], memory: Mapping[str, memoryview], *, place: int, examples: int, text_tokens: int
    ) -> list[tuple[int, memoryview]]:
        """What to read of an example: offset in the shard, and the place in the batch's memory that it fills."""
        parts = []
        for name, whole in memory.items():
            size = len(whole) // examples
            own = whole[place * size : (place + 1) * size]
            offset = row[name]
            if name == "text":
                offset, tokens = row["text"], row["text_tokens"]
                if tokens > text_tokens:
                    offset, tokens = row["short_text"], row["short_text_tokens"]
                filled = tokens * self.manifest.text_dim * self.dtype.itemsize
                own[filled:] = bytes(size - filled)
                own = own[:filled]
            parts.append((offset, own))
        return parts

    def record(self, example_id: int) -> dict[str, Any]:
        """The record's JSON: video id, frames, crop, masks as RLE and expressions of the example's clip."""
        row = self.index[example_id]
        file = self._files.open(int(row["shard"]))
        with damaged_record(f"{file.path}, example {example_id}"):
            return parse_object(file.record(int(row["record"]), int(row["record_length"])))

    def sentence(self, example_id: int) -> str:
        """The sentence that names the example's objects."""
        record, place = self.record(example_id), int(self.index[example_id]["expression"])
        with damaged_record(self.folder):
            return str(record["expressions"][place]["text"])

    def close(self) -> None:
        self._files.open.cache_clear()


def shapes_of(manifest: Manifest, bucket: BucketEntry, *, examples: int, tokens: int, needs: Collection[str]) -> Wanted:
    """Shape and dtype of each tensor of a batch of one bucket; `tokens` is the length of its longest text."""
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    latent = (examples, manifest.latent_channels, *bucket.latent_shape)
    every: Wanted = {
        **dict.fromkeys(LATENTS, (latent, dtype)),
        "text": ((examples, tokens, manifest.text_dim), dtype),
        "mask_pixels": ((examples, bucket.frames, bucket.height, bucket.width), torch.bool),
        "annotated": ((examples, bucket.frames), torch.bool),
    }
    own = {"annotated"} if "mask_pixels" in needs and manifest.partly_annotated else set()
    return {name: shape for name, shape in every.items() if name in needs or name in own}


def _mask_of(file: "_OpenFile", row: dict[str, int]) -> dict[str, Any]:
    """The mask of an example, as its record has it."""
    with damaged_record(file.path):
        record = parse_object(file.record(row["record"], row["record_length"]))
        mask: dict[str, Any] = record["masks"][row["mask"]]
        return mask


@contextmanager
def damaged_record(where: object) -> Iterator[None]:
    """While inside, a record whose JSON is not of a clip is a CacheError."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CacheError(f"{where}: a record is damaged ({reason}); run `flowmask cache verify`") from error


def fill_masks(
    batch: Mapping[str, Tensor], place: int, mask: Mapping[str, Any], *, bucket: BucketEntry, where: str
) -> None:
    """Copy a record's mask into a place of a batch: `mask_pixels` bool [b F H W]; `annotated` bool [b F] if there."""
    with damaged_record(where):
        masks = rle.decode_frames(mask["rle"], size=(bucket.height, bucket.width), where=where)
        batch["mask_pixels"][place] = torch.from_numpy(masks)
        if "annotated" in batch:
            batch["annotated"][place] = torch.tensor(mask.get("annotated", True))


def refuse_text_tokens(manifest: Manifest, text_tokens: int, *, where: Path | str | None) -> None:
    """ConfigError if some sentence of a cache is stored neither whole nor cut to this length."""
    longest = manifest.longest_text_tokens
    if text_tokens < longest and text_tokens != SHORT_TEXT:
        raise ConfigError(
            f"model.text_tokens is {text_tokens}, but {where} has a sentence of {longest} tokens, and "
            f"stores long ones cut to {SHORT_TEXT} and {LONG_TEXT} only: use one of these, or {longest}"
        )


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to be written in place."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


class _OpenFile:
    """A shard, open until nobody refers to it any more."""

    def __init__(self, path: Path, *, size: int):
        self.path, self.size = path, size
        try:
            self.descriptor = open_regular(path, inside=path.parents[1])
        except OSError as error:
            raise _unreadable(path, error) from error
        weakref.finalize(self, os.close, self.descriptor)
        _check_size(path, os.fstat(self.descriptor).st_size, expected=size)

    def record(self, offset: int, length: int) -> bytes:
        """The JSON of a record, as it is written."""
        if offset + length > self.size:
            raise CacheError(f"{self.path}: ends before byte {offset + length}, where the index has a record")
        content = bytearray(length)
        self.read(memoryview(content), offset)
        return bytes(content)

    def read(self, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            count = self._preadv([into[done:]], offset + done)
            if not count:
                raise CacheError(f"{self.path}: ends before byte {offset + len(into)}: the file was cut")
            done += count

    def read_parts(self, parts: list[tuple[int, memoryview]]) -> None:
        """Fill each buffer from its offset; those that follow each other in the file by one call."""
        parts = sorted(parts, key=itemgetter(0))
        if parts and parts[-1][0] > self.size:  # no place of a file: preadv would not take the largest ones
            raise CacheError(f"{self.path}: ends before byte {parts[-1][0]}, where the index has an example")
        while parts:
            offset, run, end = parts[0][0], 0, parts[0][0]
            while run < len(parts) and parts[run][0] == end:
                end += len(parts[run][1])
                run += 1
            if run == 1 or self._preadv([into for _, into in parts[:run]], offset) < end - offset:
                for start, into in parts[:run]:
                    self.read(into, start)  # alone, or cut short: one by one, which names a file that ends
            parts = parts[run:]

    def _preadv(self, buffers: list[memoryview], offset: int) -> int:
        try:
            return os.preadv(self.descriptor, buffers, offset)
        except OSError as error:
            raise CacheError(f"{self.path}: cannot be read: {error.strerror}") from error


class _OpenFiles:
    """Opens shards; the _MAX_OPEN_FILES used last stay open."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder = folder / FOLDER
        self.open = lru_cache(maxsize=_MAX_OPEN_FILES)(self._open)
        self._numbers = [shard_number(shard.file) for shard in manifest.shards]
        self._sizes = dict(zip(self._numbers, (shard.size for shard in manifest.shards), strict=True))

    def check(self) -> None:
        """CacheError unless every shard is a file there, of the right size; names one that is not."""
        try:
            refuse_outside(self._folder, self._folder.parent)
        except OSError as error:
            raise _unreadable(self._folder, error) from error

        def some(start: int) -> None:
            for number in self._numbers[start::_CHECKING_THREADS]:
                path = f"{self._folder}/{shard_name(number)}"
                try:
                    found = os.lstat(path)  # half the time of a Path's
                    if not stat.S_ISREG(found.st_mode):  # most likely a link
                        os.close(open_regular(Path(path), inside=self._folder.parent))
                        found = os.stat(path)  # noqa: PTH116
                except OSError as error:
                    raise _unreadable(Path(path), error) from error
                if found.st_size != self._sizes[number]:
                    _check_size(Path(path), found.st_size, expected=self._sizes[number])

        with ThreadPoolExecutor(_CHECKING_THREADS) as pool:  # a shared filesystem answers many at once
            list(pool.map(some, range(_CHECKING_THREADS)))

    def _open(self, shard: int) -> _OpenFile:
        path = self._folder / shard_name(shard)
        if shard not in self._sizes:
            raise CacheError(f"{path}: the index names it, the manifest doesn't; build the cache again")
        return _OpenFile(path, size=self._sizes[shard])


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
