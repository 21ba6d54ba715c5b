"""Two caches of one fingerprint, tensor by tensor: caches of different devices are equal within a tolerance.

Everything except latents and embeddings (clips, crops, RLEs, sentences, shapes) must be exactly equal.
Caches of different fingerprints are refused, with the differing fields.
"""

from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from flowmask.data_pipeline.cache.manifest import Manifest, read_manifest
from flowmask.data_pipeline.cache.shards import FOLDER
from flowmask.data_pipeline.check.verify_masks import LATENT_TOLERANCE, distance
from flowmask.data_pipeline.check.verify_shard import WrongError, stored_records
from flowmask.data_pipeline.plan.fingerprint import refuse_other
from flowmask.models.errors import CacheError


@dataclass
class Comparison:
    """Relative L2 of the differences by kind of tensor, the largest of each, and everything beyond `tolerance`."""

    tolerance: float = LATENT_TOLERANCE
    shards: int = 0
    identical: int = 0
    largest_error: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "shards": self.shards,
            "identical": self.identical,
            "largest_error": self.largest_error,
            "tolerance": self.tolerance,
            "problems": self.problems,
        }


def compare(folder: Path, against: Path) -> Comparison:
    """Compare all shards of two finished caches; CacheError if one is unfinished or their contents do not match."""
    ours, theirs = read_manifest(folder), read_manifest(against)
    refuse_other(ours.fingerprint, theirs.fingerprint, where=against, advice="compare caches of the same things")
    result = Comparison(shards=len(ours.shards))
    hashes = {entry.file: entry.sha256 for entry in theirs.shards}
    for entry in ours.shards:
        if hashes.get(entry.file) == entry.sha256:
            result.identical += 1
        else:
            _compare_shard(result, folder / FOLDER / entry.file, against / FOLDER / entry.file)
    _compare_counts(result, ours, theirs)
    return result


def _compare_counts(result: Comparison, ours: Manifest, theirs: Manifest) -> None:
    for name in ("clips", "examples", "dropped_empty_masks", "buckets"):
        if getattr(ours, name) != getattr(theirs, name):
            result.problems.append(f"{name}: {getattr(ours, name)} here, {getattr(theirs, name)} there")


def _compare_shard(result: Comparison, one: Path, other: Path) -> None:
    try:
        for ours, theirs in zip_longest(stored_records(one), stored_records(other)):
            if ours is None or theirs is None or ours[:2] != theirs[:2]:
                result.problems.append(f"{one}: clip {(ours or theirs)[0]} is another one there")
                return
            _compare_tensors(result, f"{one}: clip {ours[0]}", ours[2], theirs[2])
    except (WrongError, OSError, ValueError, KeyError) as error:
        raise CacheError(f"{one} or {other} cannot be read ({error}); see `flowmask cache verify` of both") from error


def _compare_tensors(result: Comparison, where: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    if ours.keys() != theirs.keys():
        result.problems.append(f"{where}: {sorted(ours.keys() ^ theirs.keys())} only in one of them")
        return
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            result.problems.append(f"{where}: {name} is {tuple(tensor.shape)}, there {tuple(theirs[name].shape)}")
            continue
        kind = name.split(".")[0]
        error = distance(tensor, theirs[name])
        result.largest_error[kind] = max(error, result.largest_error.get(kind, 0.0))
        if not error <= result.tolerance:
            result.problems.append(f"{where}: {name} differs by {error:.4f}, more than {result.tolerance:g}")
