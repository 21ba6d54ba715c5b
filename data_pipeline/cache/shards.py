"""Shards: valid WebDataset tar files whose bytes depend only on their records, written atomically.

A record is one clip, {key}.json and {key}.safetensors. Data is written to a temporary file, flushed to
disk and renamed, so a shard with its final name is complete.
"""

import io
import os
import re
import struct
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flowmask.models.errors import CacheError, TakenOverError
from flowmask.models.files import TEMPORARY, sha256_of_open, whole_file
from flowmask.models.stored.sealed import parse_object, to_json

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "shards"
_TAR = re.compile(r"\d{6,18}\.tar")


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def shard_number(name: str) -> int:
    return int(name.removesuffix(".tar"))


def sidecar_name(number: int) -> str:
    return f"{number:06d}.json"


def listed_units(folder: Path) -> set[int]:
    """Units for which a listing shows tar and sidecar: one question instead of one per unit.

    Only the sidecar tells whether a tar is complete; a unit without records has no tar and is not listed here.
    """
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries}
    tars = (shard_number(name) for name in names if _TAR.fullmatch(name))
    return {number for number in tars if sidecar_name(number) in names}


@contextmanager
def cache_file(path: Path) -> Iterator[IO[bytes]]:
    """`whole_file` in a folder with several writers.

    Two writers of one path are harmless: one removes the other's temporary file, and the slower writer gets a
    TakenOverError. An OSError (a full disk, no right to write) is raised as a CacheError with the path.
    """
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.parent.is_dir():
            raise TakenOverError(f"{path}: another worker has taken over this file") from error
        raise CacheError(f"cannot write {path}: {error.strerror or error}; complete files are kept") from error


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete temporary files of killed writers of `name`; only for the worker that holds the claim."""
    for leftover in folder.glob(f"{TEMPORARY}{name}.*"):
        leftover.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    with cache_file(path) as file:
        file.write(content)


@dataclass(frozen=True)
class StoredRecord:
    """Position of a record in its tar. json: offset and length; at: offset of `tensors`; end: of the next member."""

    key: str
    meta: dict[str, Any]
    tensors: bytes
    json: tuple[int, int]
    at: int
    end: int


def tar_records(file: IO[bytes], *, size: int) -> Iterator[StoredRecord]:
    """The records of a shard of `size` bytes, read from front to back; memory holds one record.

    ValueError for a member that ShardWriter does not make: links, holes and headers with more than a name and a size
    are refused before use. The file must end with the tar, unless the reader stops earlier.
    """
    at, waiting = 0, None
    while (block := _exactly(file, tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.TarError as error:
            raise ValueError(f"no valid tar header at byte {at}: {error}") from None
        at += tarfile.BLOCKSIZE
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 <= member.size <= size - at:
            raise ValueError(f"{member.name!r} is not a file of a record, or is larger than the shard")
        content, place = _exactly(file, member.size), (at, member.size)
        at += member.size + len(_exactly(file, -member.size % tarfile.BLOCKSIZE))
        key, _, kind = member.name.partition(".")
        if waiting is None and kind == "json":
            waiting = (key, content, place)
        elif waiting is not None and (waiting[0], "safetensors") == (key, kind):
            yield StoredRecord(key, parse_object(waiting[1]), content, waiting[2], at=place[0], end=at)
            waiting = None
        else:
            raise ValueError(f"{member.name!r} is not the next of a record's two files")
    if waiting is not None:
        raise ValueError(f"{waiting[0]} has no tensors")


def _exactly(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    while len(content) < size and (more := file.read(size - len(content))):
        content += more
    if len(content) < size:
        raise ValueError("it ends too early")
    return content


def tensor_ranges(safetensors: bytes) -> dict[str, tuple[int, int]]:
    """Byte range (start, end) of each tensor in a safetensors file, from its header; ValueError if it is damaged."""
    if len(safetensors) < 8:
        raise ValueError("not safetensors: it is too short")
    (length,) = struct.unpack("<Q", safetensors[:8])
    header = parse_object(safetensors[8 : 8 + length]) if length <= len(safetensors) else {}
    ranges = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or [type(at) for at in offsets] != [int, int]:
            raise ValueError(f"not safetensors: {name[:40]} has no byte range")
        start, end = (8 + length + at for at in offsets)
        if not 8 + length <= start <= end <= len(safetensors):
            raise ValueError(f"not safetensors: {name[:40]} lies outside of the file")
        ranges[name] = (start, end)
    return ranges


@dataclass
class RecordPlace:
    """Positions of a record's parts in its tar: byte offset and length."""

    json: tuple[int, int]
    tensors: dict[str, tuple[int, int]]


@dataclass
class ShardWriter:
    """Writes records into an open file as a tar; `sha256` and `size` are known after `close`."""

    file: IO[bytes]
    records: int = 0
    _tar: tarfile.TarFile = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, key: str, *, meta: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> RecordPlace:
        """Append one record with its tensors by name, of any shape.

        `key` must not hold a dot: WebDataset cuts names at the first one.
        """
        from safetensors.torch import save

        assert "." not in key
        content = save(dict(tensors))
        json_place = self._member(f"{key}.json", to_json(meta))
        start, _ = self._member(f"{key}.safetensors", content)
        self.records += 1
        ranges = {name: (start + begin, end - begin) for name, (begin, end) in tensor_ranges(content).items()}
        return RecordPlace(json=json_place, tensors=ranges)

    def _member(self, name: str, content: bytes) -> tuple[int, int]:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(content), 0o644, 0
        self._tar.addfile(info, io.BytesIO(content))
        return self.file.tell() - (-len(content) % tarfile.BLOCKSIZE) - len(content), len(content)

    def close(self) -> tuple[int, str]:
        """End the tar; returns its size and sha256, read back from the file as written."""
        self._tar.close()
        self.file.flush()
        self.file.seek(0)
        digest = sha256_of_open(self.file)
        return self.file.tell(), digest
