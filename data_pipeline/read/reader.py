"""Reading a finished cache: exactly the bytes that an example needs, straight into the batch's tensors.

Thread safe. Opening refuses a cache that is unfinished or of another version. A missing shard, or one of another
size than in the manifest, is refused when first read. With `check` all shards and the hash of the index are
checked at the start: in one process of a run, so that 1,000 ranks do not query every shard. Positions from the index
are checked against the shard and the manifest's buckets. `CacheFiles` reads the bytes.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.cache.index import ROW
from flowmask.data_pipeline.cache.manifest import LONG_TEXT, SHORT_TEXT, BucketEntry, Manifest
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.read.buffers import Buffers, Wanted
from flowmask.data_pipeline.read.files import CacheFiles, LocalFiles, Parts
from flowmask.models.errors import CacheError, ConfigError
from flowmask.models.stored.sealed import parse_object

LATENTS = ("video_mean", "video_logvar", "mask_mean")
FROM_JSON = ("mask_pixels", "annotated")
NEEDS = frozenset((*LATENTS, "text", "mask_pixels"))


class CacheReader:
    """A finished cache, opened for reading by example id.

    Training uses only these members of a reader (also of one that combines several caches): `buckets`, `manifest`,
    `read`, `record`, `bucket_of`, `check_text_tokens`, `waits`, `close`.
    check: check the index's hash and every shard's size now; otherwise a shard's size when first read.
    pin: read into page-locked memory.
    """

    def __init__(self, files: Path | CacheFiles, *, check: bool = True, pin: bool = False):
        self._files = files = LocalFiles(files) if isinstance(files, Path) else files
        self.place, self.waits, self._buffers = files.place, files.waits, Buffers(pin=pin)
        self.manifest: Manifest = files.manifest
        self.index: NDArray[Any] = files.index(check=check)
        self.dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        self.buckets: list[Bucket] = [bucket.counts() for bucket in self.manifest.buckets]
        if check:
            files.check()

    @property
    def folder(self) -> Path:
        """The cache's folder, for code that needs more than examples."""
        assert isinstance(self.place, Path), f"{self.place} is no folder here"
        return self.place

    def check_text_tokens(self, text_tokens: int) -> None:
        """ConfigError if some sentence is stored neither whole nor cut to this length."""
        refuse_text_tokens(self.manifest, text_tokens, where=self.place)

    def bucket_of(self, example_id: int) -> BucketEntry:
        return self._bucket(self.index[example_id][None])

    def _bucket(self, rows: NDArray[Any]) -> BucketEntry:
        """The common bucket of rows of the index."""
        number = int(rows[0]["bucket"])
        if number >= len(self.manifest.buckets) or (rows["bucket"] != number).any():
            raise CacheError(f"{self.place}: the index has examples of another bucket than the manifest says")
        return self.manifest.buckets[number]

    def read(self, example_ids: NDArray[np.integer], *, needs: Collection[str], text_tokens: int) -> dict[str, Tensor]:
        """Tensors of examples [b] of one bucket.

        returns: of `needs`: video_mean, video_logvar, mask_mean [b 16 f h w] raw, stored dtype; text [b L D],
                 stored dtype, L the largest number of tokens (at most text_tokens), zeros after shorter
                 ones; mask_pixels bool [b F H W], and annotated bool [b F] if the cache has clips with
                 unannotated frames
        """
        assert set(needs) <= NEEDS, f"unknown needs {set(needs) - NEEDS}"
        rows = self.index[example_ids]
        bucket = self._bucket(rows)
        whole = rows["text_tokens"] <= text_tokens
        short = rows["short_text_tokens"]
        longest = int(np.where(whole, rows["text_tokens"], short).max())
        if rows["text_tokens"].max() > self.manifest.longest_text_tokens or short.max() > SHORT_TEXT:
            raise CacheError(f"{self.place}: the index has a text that is longer than the manifest's longest")
        batch = self._buffers.tensors(shapes_of(self.manifest, bucket, examples=len(rows), tokens=longest, needs=needs))
        memory = {name: _bytes(tensor) for name, tensor in batch.items() if name not in FROM_JSON}
        wanted, records = [], []
        for place, values in enumerate(rows.tolist()):
            row = dict(zip(ROW.names or (), values, strict=True))
            parts = self._parts(row, memory, place=place, examples=len(rows), text_tokens=text_tokens)
            if "mask_pixels" in batch:
                records.append((row, self._files.record_memory(row["shard"], row["record"], row["record_length"])))
                parts.append((row["record"], records[-1][1]))
            wanted.append((row["shard"], parts))
        self._files.read(wanted)
        for place, (row, record) in enumerate(records):
            where = self._files.where(row["shard"])
            mask = _mask_of(record, row["mask"], where=where)
            fill_masks(batch, place, mask, bucket=bucket, where=f"{where}, mask {row['mask']}")
        return batch

    def _parts(
        self, row: dict[str, int], memory: Mapping[str, memoryview], *, place: int, examples: int, text_tokens: int
    ) -> Parts:
        """The parts of an example to read: offset in the shard, and memory of the batch to fill."""
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
        shard, offset = int(row["shard"]), int(row["record"])
        memory = self._files.record_memory(shard, offset, int(row["record_length"]))
        self._files.read([(shard, [(offset, memory)])])
        with damaged_record(f"{self._files.where(shard)}, example {example_id}"):
            return parse_object(bytes(memory))

    def sentence(self, example_id: int) -> str:
        """The sentence that names the example's objects."""
        record, place = self.record(example_id), int(self.index[example_id]["expression"])
        with damaged_record(self.place):
            return str(record["expressions"][place]["text"])

    def close(self) -> None:
        self._files.close()


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


def _mask_of(record: memoryview, place: int, *, where: str) -> dict[str, Any]:
    """A mask of a record."""
    with damaged_record(where):
        mask: dict[str, Any] = parse_object(bytes(record))["masks"][place]
        return mask


@contextmanager
def damaged_record(where: object) -> Iterator[None]:
    """Inside the block, invalid JSON of a record is a CacheError."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CacheError(f"{where}: a record is damaged ({reason}); run `flowmask cache verify`") from error


def fill_masks(
    batch: Mapping[str, Tensor], place: int, mask: Mapping[str, Any], *, bucket: BucketEntry, where: str
) -> None:
    """Copy a record's mask into a position of a batch: `mask_pixels` bool [b F H W].

    `annotated` bool [b F] if present.
    """
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
