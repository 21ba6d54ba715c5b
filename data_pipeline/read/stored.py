"""A cache in an object store: only the ranges that examples need, through a bounded cache on the node's disk.

A range is the bytes of one tensor or record. The ranges of a batch are requested together, with one request for
neighbours, by one process of each node. On disk each range is followed by a checksum, so that a damaged file is
fetched again. Its name contains the SHA-256 of its shard, so that caches are not confused. The index is fetched once,
and hashed when it is opened. A server's answer is checked by its length and the object's size; `flowmask cache verify
URL` hashes all shards.
"""

import os
import socket
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.cache import index, manifest
from flowmask.data_pipeline.cache.manifest import parse_manifest
from flowmask.data_pipeline.cache.objects import ByteRange, ObjectStore, hash_of
from flowmask.data_pipeline.cache.shards import FOLDER
from flowmask.data_pipeline.read.disk_cache import DiskCache
from flowmask.data_pipeline.read.files import CacheFiles, Parts
from flowmask.models.errors import CacheError
from flowmask.models.files import sha256_of_open

_GAP = 4  # at most 1/4 of a joined request may be bytes between ranges
_LONGEST = 8 << 20  # bytes of a request that joins ranges
_CHECKSUM_BYTES = 4
_SUMMED = 512  # words of 8 bytes, a block of a disk
Range = tuple[int, int, int]  # shard, first byte, length


class StoredFiles(CacheFiles):
    """A cache at a URL. local: the folder below which each node keeps at most `local_gib` GiB of ranges."""

    waits = True

    def __init__(self, url: str, *, local: Path, local_gib: float, retries: int):
        self._store = ObjectStore(url, retries=retries)
        content = self._store.whole(manifest.FILE, limit=manifest.MOST_BYTES)
        super().__init__(self._store.url, parse_manifest(content, where=f"{self._store.url}/{manifest.FILE}"))
        self._disk = DiskCache(local / socket.gethostname(), limit=int(local_gib * (1 << 30)))
        self._held: weakref.finalize[Any, Any] | None = None

    def index(self, *, check: bool) -> NDArray[Any]:
        """`ROW` [rows]; its hash is always checked, since a local copy may be damaged."""
        entry = self.manifest.index
        name = f"{entry.sha256}.npy"
        self._disk.once([name], ready=self._hold, fetch=self._fetch_index)
        if self._held is None and not self._hold(name):
            raise CacheError(
                f"data.local_cache_gib: {self._disk.limit} bytes are too few for the index of {self.place}, "
                f"{entry.size} bytes; raise it"
            )
        path, rows = self._disk.folder / name, self.manifest.examples
        return index.open_index(path, entry, home=self._disk.folder, rows=rows, check=False)

    def _hold(self, name: str) -> bool:
        """Keep the local index open if it is correct, so that nobody deletes it."""
        if (descriptor := self._disk.hold(name)) is None:
            return False
        with os.fdopen(os.dup(descriptor), "rb") as file:
            right = sha256_of_open(file) == self.manifest.index.sha256
        if right:
            self._held = weakref.finalize(self, os.close, descriptor)
        else:
            os.close(descriptor)
            self._disk.drop(name)
        return right

    def _fetch_index(self, names: list[str]) -> None:
        entry = self.manifest.index
        pieces = list(self._store.pieces(index.FILE, entry.size))
        if hash_of(pieces) != entry.sha256:
            raise CacheError(
                f"{self.place}/{index.FILE}: the index is damaged: its SHA-256 is not that of the manifest; upload the "
                "whole cache again"
            )
        self._disk.put({names[0]: pieces})

    def check(self) -> None:
        sizes = self._store.sizes()
        for entry in self.manifest.shards:
            name = f"{FOLDER}/{entry.file}"
            if name not in sizes:
                raise CacheError(f"{self.place}/{name}: missing; upload the whole cache again")
            self._store.refuse_size(name, sizes[name], expected=entry.size)

    def read(self, wanted: Sequence[tuple[int, Parts]]) -> None:
        asked: dict[Range, list[memoryview]] = {}
        for shard, parts in wanted:
            for offset, into in parts:
                if offset + len(into) > self.size(shard):
                    end = offset + len(into)
                    raise CacheError(f"{self.where(shard)}: ends before byte {end}, where the index has an example")
                if len(into):
                    asked.setdefault((shard, offset, len(into)), []).append(into)
        named = {self._name(one): one for one in asked}

        def ready(name: str) -> bool:
            return self._from_disk(name, asked[named[name]])

        def fetch(names: list[str]) -> None:
            self._from_store({named[name]: asked[named[name]] for name in names})

        self._disk.once(named, ready=ready, fetch=fetch)

    def _name(self, one: Range) -> str:
        shard, offset, length = one
        return f"{self.shards[shard].sha256[:32]}-{offset}-{length}"

    def _from_disk(self, name: str, into: Sequence[memoryview]) -> bool:
        checksum = bytearray(_CHECKSUM_BYTES)
        if not self._disk.read(name, [into[0], memoryview(checksum)]):
            return False
        if _checksum(into[0]) != checksum:
            self._disk.drop(name)
            return False
        for other in into[1:]:
            other[:] = into[0]
        return True

    def _from_store(self, asked: Mapping[Range, Sequence[memoryview]]) -> None:
        requests = {
            ByteRange(f"{FOLDER}/{self.shards[one.shard].file}", one.start, one.stop, self.size(one.shard)): one
            for one in joined(asked)
        }

        def keep(answered: ByteRange, content: memoryview) -> None:
            files = {}
            for found in requests[answered].ranges:
                _, offset, length = found
                piece = content[offset - answered.start :][:length]
                for into in asked[found]:
                    into[:] = piece
                files[self._name(found)] = (piece, _checksum(asked[found][0]))  # aligned memory is faster
            self._disk.put(files)

        self._store.ranges(list(requests), keep)

    def close(self) -> None:
        if self._held is not None:
            self._held()


@dataclass
class Request:
    """Bytes start..stop-1 of a shard, which contain all of `ranges`; `needed`: bytes in the ranges."""

    shard: int
    start: int
    stop: int
    needed: int
    ranges: list[Range] = field(default_factory=list)


def joined(ranges: Mapping[Range, Any] | Sequence[Range]) -> Iterator[Request]:
    """Joins ranges to few requests: neighbours are joined if at most one byte in _GAP is not needed."""
    request: Request | None = None
    for one in sorted(ranges):
        shard, offset, length = one
        if request is not None and shard == request.shard:
            stop, needed = max(request.stop, offset + length), request.needed + length
            size = stop - request.start
            if size <= _LONGEST and (size - needed) * _GAP <= size:
                request.stop, request.needed = stop, needed
                request.ranges.append(one)
                continue
        if request is not None:
            yield request
        request = Request(shard, offset, offset + length, length, [one])
    if request is not None:
        yield request


def _checksum(content: memoryview) -> bytes:
    """CRC-32 of the sums of each block's words: truncated, lost and moved blocks and wrong words change it.

    A CRC-32 of all bytes takes ten times as long.
    """
    end = len(content) // (8 * _SUMMED) * (8 * _SUMMED)
    sums = np.frombuffer(content[:end], np.uint64).reshape(-1, _SUMMED).sum(axis=1)
    return crc32(content[end:], crc32(sums)).to_bytes(_CHECKSUM_BYTES, "little")
