"""Access to the bytes of a cache: the interface of readers, and its implementation for a folder.

Thread safe; `preadv` releases the GIL. A cache in an object store is `stored.py`.
"""

import os
import stat
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from flowmask.data_pipeline.cache.index import FILE, open_index
from flowmask.data_pipeline.cache.manifest import Manifest, read_manifest
from flowmask.data_pipeline.cache.shards import FOLDER, shard_name, shard_number
from flowmask.models.errors import CacheError
from flowmask.models.stored.regular import open_regular, refuse_outside

Parts = list[tuple[int, memoryview]]  # offset in a shard, and the memory to fill from there
_MAX_OPEN_FILES = 256
_CHECKING_THREADS = 8
_OPENING = 64  # locks, each of a share of the shards


class CacheFiles(ABC):
    """The files of one finished cache. `place` is for messages: its folder or URL.

    waits: reading mostly waits for a server, so many reads should be requested at once.
    """

    waits = False

    def __init__(self, place: Path | str, manifest: Manifest):
        self.place, self.manifest = place, manifest
        self.shards = {shard_number(shard.file): shard for shard in manifest.shards}

    def where(self, shard: int) -> str:
        return f"{self.place}/{FOLDER}/{shard_name(shard)}"

    def size(self, shard: int) -> int:
        """Bytes of a shard; raises CacheError if the cache has no such shard."""
        if shard not in self.shards:
            raise CacheError(
                f"{self.where(shard)}: the index names it, but the manifest does not; build the cache again"
            )
        return self.shards[shard].size

    def record_memory(self, shard: int, offset: int, length: int) -> memoryview:
        """Memory for a record's JSON; CacheError if the shard ends before it."""
        if offset + length > self.size(shard):
            raise CacheError(f"{self.where(shard)}: ends before byte {offset + length}, where the index has a record")
        return memoryview(bytearray(length))

    @abstractmethod
    def index(self, *, check: bool) -> NDArray[Any]:
        """The index, memory-mapped, `ROW` [rows]; CacheError if it is damaged. check: its hash too."""

    @abstractmethod
    def check(self) -> None:
        """Raises CacheError, with the name, if a shard is missing or has another size."""

    @abstractmethod
    def read(self, wanted: Sequence[tuple[int, Parts]]) -> None:
        """Fill parts of shards, given by their numbers."""

    @abstractmethod
    def close(self) -> None:
        """Close all files."""


class LocalFiles(CacheFiles):
    """A cache in a folder; the _MAX_OPEN_FILES most recently used shards stay open."""

    def __init__(self, folder: Path):
        super().__init__(folder, read_manifest(folder))
        self._folder = folder
        self._kept = lru_cache(maxsize=_MAX_OPEN_FILES)(self._open)
        self._opening = [Lock() for _ in range(_OPENING)]

    def index(self, *, check: bool) -> NDArray[Any]:
        """`ROW` [rows], see `CacheFiles`."""
        folder, manifest = self._folder, self.manifest
        return open_index(folder / FILE, manifest.index, home=folder, rows=manifest.examples, check=check)

    def check(self) -> None:
        folder = self._folder / FOLDER
        try:
            refuse_outside(folder, self._folder)
        except OSError as error:
            raise _unreadable(folder, error) from error
        numbers = list(self.shards)

        def some(start: int) -> None:
            for number in numbers[start::_CHECKING_THREADS]:
                path = f"{folder}/{shard_name(number)}"
                try:
                    found = os.lstat(path)  # takes half the time of Path's
                    if not stat.S_ISREG(found.st_mode):  # most likely a link
                        os.close(open_regular(Path(path), inside=self._folder))
                        found = os.stat(path)  # noqa: PTH116
                except OSError as error:
                    raise _unreadable(Path(path), error) from error
                if found.st_size != self.shards[number].size:
                    _check_size(Path(path), found.st_size, expected=self.shards[number].size)

        with ThreadPoolExecutor(_CHECKING_THREADS) as pool:  # a shared filesystem answers many requests in parallel
            list(pool.map(some, range(_CHECKING_THREADS)))

    def read(self, wanted: Sequence[tuple[int, Parts]]) -> None:
        for shard, parts in wanted:
            self._shard(shard).read_parts(parts)

    def close(self) -> None:
        self._kept.cache_clear()

    def _shard(self, shard: int) -> "_OpenFile":
        with self._opening[shard % _OPENING]:  # two threads that need one shard open it once; others hardly wait
            return self._kept(shard)

    def _open(self, shard: int) -> "_OpenFile":
        return _OpenFile(self._folder / FOLDER / shard_name(shard), size=self.size(shard))


class _OpenFile:
    """A shard, open until it is no longer referenced."""

    def __init__(self, path: Path, *, size: int):
        self.path, self.size = path, size
        try:
            self.descriptor = open_regular(path, inside=path.parents[1])
        except OSError as error:
            raise _unreadable(path, error) from error
        weakref.finalize(self, os.close, self.descriptor)
        _check_size(path, os.fstat(self.descriptor).st_size, expected=size)

    def read(self, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            count = self._preadv([into[done:]], offset + done)
            if not count:
                raise CacheError(f"{self.path}: ends before byte {offset + len(into)}: the file is truncated")
            done += count

    def read_parts(self, parts: list[tuple[int, memoryview]]) -> None:
        """Fill each buffer from its offset, with one call for neighbouring ranges."""
        parts = sorted(parts, key=itemgetter(0))
        if parts and parts[-1][0] > self.size:  # beyond the file: preadv does not accept the largest offsets
            raise CacheError(f"{self.path}: ends before byte {parts[-1][0]}, where the index has an example")
        while parts:
            offset, run, end = parts[0][0], 0, parts[0][0]
            while run < len(parts) and parts[run][0] == end:
                end += len(parts[run][1])
                run += 1
            if run == 1 or self._preadv([into for _, into in parts[:run]], offset) < end - offset:
                for start, into in parts[:run]:
                    # a single one, or incomplete: read one by one, which reports a file that ends
                    self.read(into, start)
            parts = parts[run:]

    def _preadv(self, buffers: list[memoryview], offset: int) -> int:
        try:
            return os.preadv(self.descriptor, buffers, offset)
        except OSError as error:
            raise CacheError(f"{self.path}: cannot be read: {error.strerror}") from error


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
