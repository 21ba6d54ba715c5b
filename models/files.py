"""Atomic writes of files, and their hashes: the only place that syncs, replaces or hashes a file."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import parse_json

TEMPORARY = ".tmp-"  # prefix of unfinished files
MARK = ".flowmask.json"  # marks a folder as FlowMask's, with kind and identity
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when the block succeeds, flushed to disk; a partial file never has the name.

    Each writer has its own temporary file in the same folder, so two writers of one path are harmless: the last one
    wins. The temporary name can't be guessed, contains the identity of the folder's mark if any, and follows no link.
    """
    owner = read_object(path.parent / MARK).get("id", "")
    beside = path.with_name(f"{TEMPORARY}{path.name[:40]}.{owner}{os.urandom(8).hex()}")
    try:
        with os.fdopen(os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "w+b") as file:
            with suppress(OSError):  # held while this process lives; a filesystem may lack locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            sync_open(file)
            beside.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def move_new(source: Path, target: Path) -> None:
    """Give a finished file or folder a new name. Raises FileExistsError if the name exists."""
    try:
        if source.is_dir():
            source.rename(target)  # the system refuses an existing file or a non-empty folder
            return
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINKS or os.path.lexists(target):
                raise
            source.rename(target)
        source.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise
    finally:
        with suppress(OSError):
            sync(target.parent)


def remove_known(folder: Path, known: Callable[[str], bool]) -> None:
    """Delete the files below `folder` for which `known` (relative path) is true, and folders that become empty."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(place, name)
            if known(path.relative_to(folder).as_posix()):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: it has other files
            Path(place).rmdir()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: readers see the old content or the new one, never a part."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_open(file: IO[bytes]) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return sha256_of_open(file)


def sha256_of_open(file: IO[bytes]) -> str:
    """SHA-256 of an open file from its position to its end."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or damaged; only for informative files."""
    try:
        found = parse_json(read_regular(path, limit=1 << 26))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
