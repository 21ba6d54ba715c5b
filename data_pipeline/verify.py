"""`flowmask cache verify`: re-read everything and name each file that is wrong, and no file that is right."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from data_pipeline import rle
from data_pipeline.index import open_index
from data_pipeline.manifest import BucketEntry, FileEntry, Manifest, read_manifest
from data_pipeline.shards import FOLDER, tensor_ranges
from models.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One wrong file, and what is wrong with it."""

    file: Path
    reason: str


@dataclass
class VerifyReport:
    """What a verification found; `ok` if nothing is wrong."""

    shards: int = 0
    records: int = 0
    examples: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


class _WrongError(Exception):
    """The first thing that is wrong with a file."""


def verify(folder: Path) -> VerifyReport:
    """Check a finished cache; CacheError if it has no readable manifest, all else is in the report."""
    manifest = read_manifest(folder)
    report = VerifyReport(shards=len(manifest.shards), examples=manifest.examples)
    index = _index(folder, manifest, report)
    by_shard = _rows_by_shard(index) if index is not None else {}
    for entry in manifest.shards:
        path = folder / FOLDER / entry.file
        rows = by_shard.get(int(Path(entry.file).stem)) if index is not None else None
        try:
            _check_hash(path, entry)
            report.records += _check_shard(path, rows, manifest=manifest, index=index)
        except (_WrongError, UserError) as wrong:
            report.problems.append(Problem(path, str(wrong)))
        except (OSError, tarfile.TarError, ValueError, KeyError) as error:
            report.problems.append(Problem(path, f"cannot be read: {error}"))
    return report


def _index(folder: Path, manifest: Manifest, report: VerifyReport) -> NDArray[Any] | None:
    """The index if it is right, else None and a problem."""
    path = folder / manifest.index.file
    try:
        _check_hash(path, manifest.index)
        return open_index(folder, rows=manifest.examples)
    except (_WrongError, UserError, OSError) as error:
        report.problems.append(Problem(path, str(error)))
        return None


def _rows_by_shard(index: NDArray[Any]) -> dict[int, NDArray[np.int64]]:
    order = np.argsort(index["shard"], kind="stable")
    shards, starts = np.unique(index["shard"][order], return_index=True)
    return dict(zip(shards.tolist(), np.split(order, starts[1:]), strict=True))


def _check_hash(path: Path, entry: FileEntry) -> None:
    if not path.exists():
        raise _WrongError("missing")
    size = path.stat().st_size
    if size != entry.size:
        raise _WrongError(f"{size} bytes, the manifest says {entry.size}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise _WrongError("its SHA-256 is not that of the manifest: a byte has changed")


def _check_shard(
    path: Path, rows: NDArray[np.int64] | None, *, manifest: Manifest, index: NDArray[Any] | None
) -> int:
    """Check a shard's records against themselves and a right index; returns how many there are."""
    buckets = {(b.frames, b.height, b.width): b for b in manifest.buckets}
    expected = {} if rows is None or index is None else {_row_key(index[row]): index[row] for row in rows}
    count = 0
    for meta, meta_place, tensors, places in _records(path):
        count += 1
        width, height = meta["size"]
        bucket = buckets.get((len(meta["frame_ids"]), height, width))
        if bucket is None:
            raise _WrongError(f"clip {meta['clip']} has a shape that the manifest does not list")
        _check_tensors(meta, tensors, bucket=bucket, manifest=manifest)
        _check_masks(meta, bucket)
        for number in range(len(meta["expressions"])):
            row = expected.pop((meta_place[0], number), None)
            if index is not None and (
                row is None or not _agrees(row, meta, number, meta_place, tensors, places)
            ):
                raise _WrongError(f"clip {meta['clip']}, expression {number}: the index says something else")
    if expected:
        raise _WrongError(f"the index has {len(expected)} examples that are not in the shard")
    return count


def _row_key(row: Any) -> tuple[int, int]:
    return int(row["record"]), int(row["expression"])


def _records(
    path: Path,
) -> Iterator[tuple[dict[str, Any], tuple[int, int], dict[str, Tensor], dict[str, int]]]:
    """JSON, its (offset, length), tensors and their offsets, of each record in a tar."""
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        for first, second in zip(members[::2], members[1::2], strict=True):
            key = first.name.removesuffix(".json")
            if (first.name, second.name) != (f"{key}.json", f"{key}.safetensors"):
                raise _WrongError(f"{first.name}, {second.name}: not a record's two files")
            texts = [tar.extractfile(member) for member in (first, second)]
            assert texts[0] is not None and texts[1] is not None
            meta, content = json.loads(texts[0].read()), texts[1].read()
            places = {name: second.offset_data + start for name, (start, _) in tensor_ranges(content).items()}
            yield meta, (first.offset_data, first.size), load(content), places


def _check_tensors(
    meta: dict[str, Any], tensors: dict[str, Tensor], *, bucket: BucketEntry, manifest: Manifest
) -> None:
    names = {"video.mean", "video.logvar", *(f"mask.{mask['j']}.mean" for mask in meta["masks"])}
    texts = {f"text.{expression['text_id']}" for expression in meta["expressions"]}
    found = {name for name in tensors if not (name.startswith("text.") and name.endswith(".t64"))}
    if found != names | texts:
        raise _WrongError(f"clip {meta['clip']} holds {sorted(found)}, its JSON says {sorted(names | texts)}")
    shape = (manifest.latent_channels, *bucket.latent_shape)
    for name, tensor in tensors.items():
        right = tensor.shape == shape if name in names else tensor.shape[1:] == (manifest.text_dim,)
        if not right or tensor.dtype != getattr(torch, manifest.dtype):
            raise _WrongError(f"clip {meta['clip']}: {name} is {tensor.dtype} {tuple(tensor.shape)}")
        if not tensor.isfinite().all():
            raise _WrongError(f"clip {meta['clip']}: {name} has a number that is not finite")


def _check_masks(meta: dict[str, Any], bucket: BucketEntry) -> None:
    for mask in meta["masks"]:
        if len(mask["rle"]) != bucket.frames:
            raise _WrongError(f"clip {meta['clip']}: mask {mask['j']} has {len(mask['rle'])} frames")
        for frame in mask["rle"]:
            rle.decode(
                frame, size=(bucket.height, bucket.width), where=f"clip {meta['clip']}, mask {mask['j']}"
            )


def _agrees(
    row: Any,
    meta: dict[str, Any],
    number: int,
    meta_place: tuple[int, int],
    tensors: dict[str, Tensor],
    places: dict[str, int],
) -> bool:
    """Whether an index row points where its example's parts stand."""
    expression = meta["expressions"][number]
    text = f"text.{expression['text_id']}"
    short = f"{text}.t64"
    wanted = {
        "video_mean": places["video.mean"],
        "video_logvar": places["video.logvar"],
        "mask_mean": places[f"mask.{expression['mask']}.mean"],
        "mask": expression["mask"],
        "text": places[text],
        "text_tokens": tensors[text].shape[0],
        "short_text": places.get(short, 0),
        "short_text_tokens": tensors[short].shape[0] if short in tensors else 0,
        "record_length": meta_place[1],
        "view": meta["view"],
    }
    return all(int(row[name]) == value for name, value in wanted.items())
