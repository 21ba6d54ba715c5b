"""Files on a node's disk, shared by its processes: at most the limit in bytes; the least recently used go first.

Thread safe, and safe between processes: each byte of one file, `locks`, is a lock (of an open file description; the
system frees it when its holder dies). The first 8 bytes of this file are the stored size. Files appear by a rename,
without a sync: the caller detects damage by a checksum and fetches again. Independent of the contents.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from zlib import crc32

from flowmask.models.errors import CacheError

Bytes = bytes | bytearray | memoryview
_LOCKS, _WRITING = "locks", "writing"
_COUNT_LOCK = 1 << 62  # the other locks are at the checksums of the names
_BLOCK = 4096  # bytes; a file occupies a multiple of it
_KEPT = 7 / 8  # share of the limit that remains after deleting, so that deleting is rare
_WRITTEN = 64  # parts per call; the system writes at most 2 GiB at once
_POLL_S, _LONGEST_POLL_S, _PATIENCE_S = 0.002, 0.05, 120.0


class DiskCache:
    """A folder of at most `limit` bytes."""

    def __init__(self, folder: Path, *, limit: int):
        self.folder, self.limit = folder, limit
        with self._naming():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.lstat(folder)
            if found.st_uid != os.geteuid():
                raise CacheError(f"data.local_cache: {folder} belongs to another user; use your own folder")
            with self._counting() as count:  # in case of a killed process or a manual change
                _set_count(count, self._evict(limit))

    def read(self, name: str, into: Sequence[memoryview]) -> bool:
        """Fill the buffers, one after another, with a file of exactly their size; False if there is none."""
        if (file := self._open(name)) is None:
            return False
        try:
            wanted = sum(map(len, into))
            if os.fstat(file).st_size == wanted and os.preadv(file, into, 0) == wanted:
                os.utime(file)
                return True
        except OSError:  # the disk fails: the data is fetched again
            pass
        finally:
            os.close(file)
        self.drop(name)
        return False

    def hold(self, name: str) -> int | None:
        """A descriptor of a file, which is not deleted until the descriptor is closed."""
        if (file := self._open(name)) is not None:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(file)
        return file

    def put(self, files: Mapping[str, Sequence[Bytes]]) -> None:
        """Store files, each given in parts; a file without room is not stored."""
        with self._naming(), self._counting() as count:
            for name, parts in files.items():
                if not (self.folder / name).exists() and self._room(count, _on_disk(sum(map(len, parts)))):
                    self._write(name, parts)

    def drop(self, name: str) -> None:
        """Delete a file that is damaged."""
        path = self.folder / name
        with self._naming(), self._counting() as count, suppress(FileNotFoundError):
            size = _on_disk(path.lstat().st_size)
            path.unlink()
            _set_count(count, max(0, _count(count) - size))

    def once(self, names: Collection[str], *, ready: Callable[[str], bool], fetch: Callable[[list[str]], None]) -> None:
        """Call `fetch` for names that are not `ready`; if another process is fetching them, wait for it instead.

        After _PATIENCE_S of waiting for another process, the files are fetched again.
        """
        missing, until = [name for name in names if not ready(name)], monotonic() + _PATIENCE_S
        pause = _POLL_S
        while missing:
            with self._claimed(missing) as claimed:
                ours = claimed if monotonic() < until else set(missing)
                left = [name for name in missing if name in ours and not ready(name)]
                if left:
                    fetch(left)
            missing = [name for name in missing if name not in ours and not ready(name)]
            if missing and not ours:
                sleep(pause)
                pause = min(2 * pause, _LONGEST_POLL_S)

    @contextmanager
    def _claimed(self, names: Collection[str]) -> Iterator[set[str]]:
        """The names that no other process or thread has claimed; the block holds their claims."""
        with self._naming():
            locks = self._open_locks()
        try:
            yield {name for name in names if _lock(locks, crc32(name.encode()), wait=False)}
        finally:
            os.close(locks)

    @contextmanager
    def _counting(self) -> Iterator[int]:
        """The descriptor of the count, locked inside the block."""
        locks = self._open_locks()
        try:
            _lock(locks, _COUNT_LOCK, wait=True)
            yield locks
        finally:
            os.close(locks)

    def _open(self, name: str) -> int | None:
        try:
            return os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None

    def _open_locks(self) -> int:
        """Open the file of locks; each holder needs a separate descriptor."""
        return os.open(self.folder / _LOCKS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _room(self, count: int, size: int) -> bool:
        """Count `size` more bytes and delete other files if needed; False if impossible."""
        if size > self.limit:
            return False
        used = _count(count)
        if used + size > self.limit:
            used = self._evict(min(int(self.limit * _KEPT), self.limit - size))
        fits = used + size <= self.limit
        _set_count(count, used + size if fits else used)
        return fits

    def _evict(self, most: int) -> int:
        """Delete the least recently used files that nobody holds, until `most` bytes are left; returns the rest."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name != _LOCKS:
                    status = entry.stat(follow_symlinks=False)
                    age = 0 if entry.name == _WRITING else status.st_mtime_ns  # left by a killed process
                    found.append((age, _on_disk(status.st_size), entry.name))
        used = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if used <= most:
                break
            if self._deleted(name):
                used -= size
        return used

    def _deleted(self, name: str) -> bool:
        """Delete a file that is not held."""
        if (file := self._open(name)) is None:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        else:
            (self.folder / name).unlink(missing_ok=True)
            return True
        finally:
            os.close(file)

    def _write(self, name: str, parts: Sequence[Bytes]) -> None:
        beside = f"{self.folder}/{_WRITING}"  # only one at a time, because the count is locked
        file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            for start in range(0, len(parts), _WRITTEN):
                some = parts[start : start + _WRITTEN]
                if os.writev(file, some) < sum(map(len, some)):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)
        os.rename(beside, f"{self.folder}/{name}")  # noqa: PTH104

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"data.local_cache: {self.folder} cannot be used ({error.strerror}); free space there, lower "
                "data.local_cache_gib, or give another folder"
            ) from error


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _count(locks: int) -> int:
    return int.from_bytes(os.pread(locks, 8, 0), "little")


def _set_count(locks: int, used: int) -> None:
    os.pwrite(locks, used.to_bytes(8, "little"), 0)


def _lock(locks: int, at: int, *, wait: bool) -> bool:
    """Lock one byte of the locks for this open file description; False if another one has it."""
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)
    try:
        fcntl.fcntl(locks, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, asked)
    except (BlockingIOError, PermissionError):
        return False
    return True
