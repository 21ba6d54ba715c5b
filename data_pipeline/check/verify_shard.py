"""Checks one shard alone: its tar, its records, and the sidecar that follows from them.

The content of a shard is compared with its own JSON and with the shapes and types of the cache. The first fault
raises a WrongError.
"""

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load
from torch import Tensor

from flowmask.data_pipeline.build.records import Rows
from flowmask.data_pipeline.cache.manifest import FILE as MANIFEST
from flowmask.data_pipeline.cache.manifest import SHORT_TEXT, Fingerprint, Manifest, read_manifest
from flowmask.data_pipeline.cache.shards import RecordPlace, tar_records, tensor_ranges
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.plan import units
from flowmask.models.errors import CacheError, UserError
from flowmask.models.files import sha256_of_open
from flowmask.models.stored.regular import open_regular, read_regular
from flowmask.models.stored.sealed import unseal

T = TypeVar("T")


MOST_BYTES = 1 << 30  # of a file that is read whole


class WrongError(Exception):
    """The first fault of a file."""


@dataclass(frozen=True)
class Storage:
    """The facts that all tensors of a cache share."""

    dtype: str
    latent_channels: int

    @classmethod
    def of(cls, fingerprint: Fingerprint, facts: Mapping[str, Any]) -> "Storage":
        """From the fingerprint and the facts of a plan."""
        return cls(dtype=fingerprint.fields["cache.dtype"], latent_channels=facts["latent_channels"])


def file_hash(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file; WrongError if it is missing or cannot be read."""
    try:
        with os.fdopen(open_regular(path, inside=path.parent), "rb") as file:
            digest = sha256_of_open(file)
            return file.tell(), digest
    except FileNotFoundError:
        raise WrongError("missing") from None
    except OSError as error:
        raise WrongError(f"cannot be read: {error.strerror}") from error


def parsed(path: Path, parse: Callable[[bytes], T]) -> T:
    """The parsed bytes of a file; WrongError if it is missing or damaged."""
    try:
        return parse(read_regular(path, limit=MOST_BYTES, inside=path.parent))
    except FileNotFoundError:
        raise WrongError("missing") from None
    except OSError as error:
        raise WrongError(f"cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise WrongError(f"damaged: {error}") from error


def readable_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished cache; None if it is damaged; CacheError if there is none."""
    try:
        return read_manifest(folder)
    except CacheError:
        if not (folder / MANIFEST).exists():
            raise
        return None


def facts_of(folder: Path, manifest: Manifest | None) -> tuple[Fingerprint, dict[str, Any]]:
    """Fingerprint and facts of a build: from its plan, or from the manifest if the plan is damaged."""
    try:
        plan = parsed(folder / units.FOLDER / "plan.json", unseal)
        return Fingerprint.model_validate(plan["fingerprint"]), plan["facts"]
    except (WrongError, ValueError, KeyError):
        if manifest is not None:
            return manifest.fingerprint, manifest.model_dump()
    raise CacheError(
        f"{folder}: neither {MANIFEST} nor {units.FOLDER}/plan.json can be read: delete the cache and build again"
    )


def read_shard(path: Path, *, unit: int, storage: Storage) -> Rows:
    """The sidecar's content for a correct shard, computed from the shard; memory holds one record."""
    rows = Rows()
    try:
        for key, meta, tensors, place in stored_records(path):
            _check_record(key, meta, tensors, storage=storage)
            rows.add(meta, tensors, place, unit=unit)
    except UserError as error:
        raise WrongError(str(error)) from error
    except WrongError:
        raise
    except Exception as error:
        raise WrongError(f"cannot be read: {' '.join(str(error).split())}") from error
    return rows


def stored_records(path: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor], RecordPlace]]:
    """Key, JSON, tensors and byte ranges of each record of a tar; WrongError if records and tar differ in size.

    tensors: video.mean, video.logvar, mask.<j>.mean [16 f h w] raw, and text.<k> [L D], in the stored dtype
    """
    used = 0
    with os.fdopen(open_regular(path, inside=path.parent), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for found in tar_records(file, size=size):
            ranges = {
                name: (found.at + start, end - start) for name, (start, end) in tensor_ranges(found.tensors).items()
            }
            used = found.end
            yield found.key, found.meta, load(found.tensors), RecordPlace(found.json, ranges)
    whole = -(-(used + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    if used and size != whole:
        raise WrongError(f"{size} bytes; its records end at {used}, so it should be {whole}")


def _check_record(key: str, meta: dict[str, Any], tensors: dict[str, Tensor], *, storage: Storage) -> None:
    width, height = meta["size"]
    frames = len(meta["frame_ids"])
    latents = {"video.mean", "video.logvar", *(f"mask.{mask['j']}.mean" for mask in meta["masks"])}
    texts = {f"text.{expression['text_id']}" for expression in meta["expressions"]}
    found = {name for name in tensors if not (name.startswith("text.") and name.endswith(f".t{SHORT_TEXT}"))}
    if found != latents | texts:
        raise WrongError(f"clip {key} holds {sorted(found)}, its JSON says {sorted(latents | texts)}")
    shape = (storage.latent_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    text_dim = tensors["text.0"].shape[-1]
    for name, tensor in tensors.items():
        right = tensor.shape == shape if name in latents else tensor.shape[1:] == (text_dim,)
        if not right or tensor.dtype != getattr(torch, storage.dtype):
            raise WrongError(f"clip {key}: {name} is {tensor.dtype} {tuple(tensor.shape)}")
        if not tensor.isfinite().all():
            raise WrongError(f"clip {key}: {name} has a number that is not finite")
    for mask in meta["masks"]:
        where = f"clip {key}, mask {mask['j']}"
        if len(mask["rle"]) != frames:
            raise WrongError(f"{where} has {len(mask['rle'])} frames, the clip {frames}")
        known = mask.get("annotated", [True] * frames)
        if len(known) != frames or not set(known) <= {True, False} or True not in known:
            raise WrongError(f"{where}: annotated is {str(known)[:40]}; the clip has {frames} frames")
        for frame in mask["rle"]:
            rle.decode(frame, size=(height, width), where=where)
