"""Shards: valid WebDataset tar files whose bytes depend on their records alone, and whole files or none.

A record is one clip, {key}.json and {key}.safetensors. Writing goes to a file beside, is flushed to the
disk and renamed, so a shard that has its name is complete.
"""

import io
import json
import struct
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from flowmask.models.errors import CacheError, TakenOverError
from flowmask.models.files import TEMPORARY, sha256_of_open, whole_file

FOLDER = "shards"


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def shard_number(name: str) -> int:
    return int(name.removesuffix(".tar"))


def sidecar_name(number: int) -> str:
    return f"{number:06d}.json"


def to_json(value: Any) -> bytes:
    """The one JSON spelling of cached files."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@contextmanager
def cache_file(path: Path) -> Iterator[IO[bytes]]:
    """`whole_file` in a folder that several workers write.

    Two writers of one path are harmless: the slower one, whose file the other took for a leftover, gets a
    TakenOverError. An OSError (a full disk, no right to write) is raised as a CacheError with the path.
    """
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.parent.is_dir():
            raise TakenOverError(f"{path}: another worker has taken this over") from error
        raise CacheError(f"cannot write {path}: {error.strerror or error}; what is complete is kept") from error


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete temporary files of killed writers of `name`; for the worker alone that holds its claim."""
    for leftover in folder.glob(f"{TEMPORARY}{name}.*"):
        leftover.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    with cache_file(path) as file:
        file.write(content)


def tensor_ranges(safetensors: bytes) -> dict[str, tuple[int, int]]:
    """Byte range (start, end) of each tensor in a safetensors file, from its header."""
    (length,) = struct.unpack("<Q", safetensors[:8])
    header = json.loads(safetensors[8 : 8 + length])
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


@dataclass
class RecordPlace:
    """Where a record's parts stand in its tar: byte offset and length."""

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

    def add(self, key: str, *, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RecordPlace:
        """Append one record; `key` must not hold a dot (WebDataset cuts names at the first one)."""
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
