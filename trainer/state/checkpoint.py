"""The format of a checkpoint, and its checks and reading, at any world size and ZeRO stage.

    checkpoints/step_00000040/rank_00000.safetensors   one rank's fragments, keyed `parameter|kind|start`
                              state.json               counters, the caller's state, every file's size and
                              SHA-256
    checkpoints/latest -> step_00000040                moves last
    checkpoints/best -> step_00000030                  the best evaluation, if there are evaluations

Needs no process group and no engine. A file whose size or hash differs from `state.json` is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowmask.models.errors import CheckpointError
from flowmask.models.files import sha256_of
from flowmask.models.stored.regular import refuse_outside
from flowmask.trainer.state.document import SavedRun, read_document, refuse_unlike
from flowmask.trainer.state.steps import STATE


@dataclass(frozen=True)
class Piece:
    """Elements start .. start + n of one parameter's `kind`, flattened; `target` [n] is filled in place."""

    name: str
    kind: str
    start: int
    target: Tensor


def damage(path: Path) -> str | None:
    """The fault that `verify` finds in a checkpoint; None if there is none."""
    try:
        verify(path)
    except CheckpointError as error:
        return str(error)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The checkpoint's `state.json`; the caller's part is under "state"."""
    return read_document(path / STATE)


def read_run(path: Path) -> dict[str, Any]:
    """`read_state` of a training's checkpoint; "state" has all members that other code needs from a run."""
    document = read_document(path / STATE)
    refuse_unlike(SavedRun, document["state"], where=f"{path / STATE}: state")
    return document


def verify(path: Path, *, share: int = 0, shares: int = 1) -> None:
    """Check size and hash of every `shares`-th file from `share` on; CheckpointError names a wrong one."""
    for name, facts in sorted(read_state(path)["files"].items())[share::shares]:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {facts['bytes']}")
        try:
            refuse_outside(file, path)
            right = sha256_of(file) == facts["sha256"]
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
        if not right:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the recorded one")


def read_full(path: Path, *, kind: str = "ema") -> dict[str, Tensor]:
    """All parameters as whole tensors, fp32 of the model's shapes, on the host; no process group is needed.

    kind: "ema" or "master"
    """
    document = read_state(path)
    whole = {name: torch.empty(shape) for name, shape in document["parameters"].items()}
    pieces = [Piece(name, kind, 0, tensor.view(-1)) for name, tensor in whole.items()]
    fill(pieces, [path / name for name in sorted(document["files"])])
    return whole


def fill(pieces: list[Piece], files: list[Path]) -> None:
    """Copy into every piece its elements, opening files in order until nothing is missing.

    Raises CheckpointError if an element is missing or stored twice, or a file cannot be read.
    """
    missing = {(piece.name, piece.kind): piece.target.numel() for piece in pieces}
    wanted = {(piece.name, piece.kind): piece for piece in pieces}
    for file in files:
        if not any(missing.values()):
            break
        try:
            with safe_open(file, framework="pt") as reader:
                for name, kind, start in _keys(reader):
                    piece = wanted.get((name, kind))
                    if piece is not None:
                        missing[name, kind] -= _copy(piece, reader.get_slice(f"{name}|{kind}|{start}"), start)
        except (OSError, SafetensorError, ValueError, IndexError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{file} cannot be read ({' '.join(str(error).split())[:200]})") from error
    for (name, kind), left in missing.items():
        if left:
            what = f"lacks {left} elements" if left > 0 else f"holds {-left} elements twice"
            raise CheckpointError(f"{files[0].parent} {what} of {kind} of {name}")


def _keys(reader: Any) -> Iterator[tuple[str, str, int]]:
    for key in reader.keys():  # noqa: SIM118  (a safetensors reader is not a mapping)
        name, kind, start = key.rsplit("|", 2)
        yield name, kind, int(start)


def _copy(piece: Piece, stored: Any, start: int) -> int:
    """Copy the overlap of `stored` (elements from `start` on) into the piece; returns the number of elements."""
    begin = max(piece.start, start)
    end = min(piece.start + piece.target.numel(), start + stored.get_shape()[0])
    if begin >= end:
        return 0
    piece.target[begin - piece.start : end - piece.start].copy_(stored[begin - start : end - start])
    return end - begin


def refuse_other_parameters(
    path: Path, stored: Mapping[str, list[int]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """CheckpointError with the first parameter of `path` that does not fit this model."""
    for name in sorted(set(stored) | set(expected)):
        ours = list(expected[name]) if name in expected else None
        if stored.get(name) != ours:
            raise CheckpointError(
                f"{path} belongs to another model: {name} has shape {stored.get(name)} there and {ours} here"
            )
