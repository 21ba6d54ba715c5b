"""Files that are whole or not there, and their hashes: the only place that syncs, replaces or hashes a file."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import parse_json

TEMPORARY = ".tmp-"  # prefix of unfinished files


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name when the block ends well, flushed to the disk; never half of it.

    Each writer has its own temporary file beside it, so two writers of one path are harmless: the last one wins.
    """
    beside = path.with_name(f"{TEMPORARY}{path.name}.{os.urandom(4).hex()}")
    try:
        with beside.open("w+b") as file:
            yield file
            sync_open(file)
        beside.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file whole: readers see the old content or the new, never a part."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_open(file: IO[bytes]) -> None:
    """Put what was written to an open file on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Put a file, or a folder's entries, on the disk."""
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
    """SHA-256 of an open file from where it stands to its end."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file, or it is damaged: for files that only inform."""
    try:
        found = parse_json(read_regular(path, limit=1 << 26))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
