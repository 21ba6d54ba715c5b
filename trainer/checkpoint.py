"""Checkpoints: complete or not there, and readable at any world size and ZeRO stage.

    checkpoints/step_00000040/rank_00000.safetensors   this rank's fragments, keyed `parameter|kind|start`
                              state.json               counters, the caller's state, every file's size and
                              SHA-256
    checkpoints/latest -> step_00000040                moves last

Everything is written into a folder beside, synced and renamed; old ones are renamed away before they are
deleted, so a kill at any moment leaves the last complete checkpoint. Refuses files whose size or hash differ
from `state.json`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.errors import CheckpointError
from trainer import distributed
from trainer.ema import ShardedEma
from trainer.engine import Engine

T = TypeVar("T")
FORMAT = 1
_STEP = re.compile(r"step_(\d{8,})")
_BESIDE = (".writing_", ".trash_", ".latest_")


@dataclass(frozen=True)
class Piece:
    """Elements start .. start + target.numel() of one parameter's `kind`, to be filled in place."""

    name: str
    kind: str
    start: int
    target: Tensor


class Checkpoints:
    """The checkpoints of one run. All methods are collective; rank 0 alone moves folders."""

    def __init__(self, folder: Path, *, keep_last: int, warn: Callable[[str], None]):
        self.folder = folder
        self._keep_last = keep_last
        self._warn = warn

    def clean(self) -> None:
        """Remove what a killed process left half written or half deleted."""
        if distributed.rank() == 0 and self.folder.is_dir():
            for path in list(self.folder.iterdir()):
                if path.name.startswith(_BESIDE):
                    _remove(path)
        distributed.barrier()

    def save(self, engine: Engine, ema: ShardedEma, *, step: int, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step` with the caller's JSON `state`, move `latest`, drop the oldest.

        CheckpointError on every rank when any of them can't write (a full disk); the earlier ones stay.
        """
        final = self.folder / f"step_{step:08d}"
        beside = self.folder / f".writing_{final.name}"

        def prepare() -> None:
            if distributed.rank() == 0:
                _remove(beside)
                beside.mkdir(parents=True)

        def write() -> tuple[str, dict[str, Any]]:
            name = f"rank_{distributed.rank():05d}.safetensors"
            save_file(_tensors_of(engine, ema), beside / name)
            _sync(beside / name)
            return name, {"bytes": (beside / name).stat().st_size, "sha256": _sha256(beside / name)}

        def publish() -> None:
            if distributed.rank() != 0:
                return
            document = {
                "format": FORMAT,
                "step": step,
                "updates": engine.updates,
                "ema_updates": ema.updates,
                "world_size": distributed.world_size(),
                "zero_stage": engine.zero_stage,
                "parameters": {key: list(shape) for key, shape in engine.shapes.items()},
                "files": files,
                "state": dict(state),
            }
            (beside / "state.json").write_text(json.dumps(document, indent=1) + "\n")
            _sync(beside / "state.json")
            _sync(beside)
            self._publish(beside, final)

        _written_by_all(prepare, beside)
        files = dict(_written_by_all(write, beside))
        _written_by_all(publish, beside)
        return final

    def _publish(self, beside: Path, final: Path) -> None:
        if final.exists():
            _remove(_rename(final, f".trash_{final.name}"))
        beside.replace(final)
        _sync(self.folder)
        link = self.folder / f".latest_{final.name}"
        _remove(link)
        link.symlink_to(final.name)
        link.replace(self.folder / "latest")
        _sync(self.folder)
        for old in complete(self.folder)[self._keep_last :]:
            if old != final:
                _remove(_rename(old, f".trash_{old.name}"))

    def newest(self) -> Path | None:
        """The newest undamaged checkpoint, None if there are none; CheckpointError if all are damaged."""
        found = distributed.broadcast_object([str(path) for path in complete(self.folder)])
        reasons = []
        for path in map(Path, found):
            problem = self._problem(path)
            if problem is None:
                return path
            reasons.append(problem)
            if distributed.rank() == 0:
                self._warn(f"{problem}; going back to the checkpoint before it")
        if reasons:
            raise CheckpointError(
                f"no usable checkpoint in {self.folder}: {'; '.join(reasons)}. Move it away to start anew"
            )
        return None

    def _problem(self, path: Path) -> str | None:
        """The first rank's complaint about `path`; each rank checks its share of the files."""
        mine: str | None = None
        try:
            verify(path, share=distributed.rank(), shares=distributed.world_size())
        except CheckpointError as error:
            mine = str(error)
        return next((problem for problem in distributed.gather_objects(mine) if problem), None)

    def restore(self, engine: Engine, ema: ShardedEma, path: Path) -> dict[str, Any]:
        """Fill masters, moments, EMA and counters from `path`, at any world size and stage.

        CheckpointError when the parameters are not this model's or an element is missing or stored twice.
        """
        document = read_state(path)
        _same_parameters(path, document["parameters"], engine.shapes)
        pieces = [
            Piece(piece.name, kind, piece.start, tensor)
            for piece in engine.held_fragments()
            for kind, tensor in piece.tensors().items()
        ]
        pieces += [
            Piece(piece.name, "ema", piece.start, shadow)
            for piece, shadow in zip(engine.fragments(), ema.shadow, strict=True)
        ]
        own = f"rank_{distributed.rank():05d}.safetensors"
        problem: str | None = None
        try:
            _fill(pieces, [path / name for name in sorted(document["files"], key=lambda name: name != own)])
        except CheckpointError as error:
            problem = str(error)
        for complaint in distributed.gather_objects(problem):
            if complaint:
                raise CheckpointError(complaint)
        engine.set_updates(document["updates"])
        ema.updates = document["ema_updates"]
        engine.refresh_weights()
        return dict(document["state"])


def _written_by_all(write: Callable[[], T], where: Path) -> list[T]:
    """Every rank's result of `write`, by rank; if the disk refused any of them, one CheckpointError on all."""
    result, problem = None, None
    try:
        result = write()
    except (OSError, SafetensorError) as error:
        problem = " ".join(str(error).split())
    found = distributed.gather_objects((result, problem))
    refused = next((said for _, said in found if said is not None), None)
    if refused is not None:
        raise CheckpointError(
            f"cannot write the checkpoint {where}: {refused}; earlier ones are kept: make room, start again"
        )
    return [result for result, _ in found]


def complete(folder: Path) -> list[Path]:
    """Step folders with a `state.json`, newest first."""
    found = [path for path in folder.glob("step_*") if _STEP.fullmatch(path.name)]
    found = [path for path in found if (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def read_state(path: Path) -> dict[str, Any]:
    """The checkpoint's `state.json`; the caller's part is under "state"."""
    try:
        document = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'} cannot be read ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path / 'state.json'} is not a checkpoint of format {FORMAT}")
    return document


def verify(path: Path, *, share: int = 0, shares: int = 1) -> None:
    """Check size and hash of every `shares`-th file from `share` on; CheckpointError names a wrong one."""
    for name, facts in sorted(read_state(path)["files"].items())[share::shares]:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {facts['bytes']}")
        if _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the recorded one")


def read_full(path: Path, *, kind: str = "ema") -> dict[str, Tensor]:
    """All parameters, whole, in fp32 on the host: `kind` is "ema" or "master". Needs no process group."""
    document = read_state(path)
    whole = {name: torch.empty(shape) for name, shape in document["parameters"].items()}
    pieces = [Piece(name, kind, 0, tensor.view(-1)) for name, tensor in whole.items()]
    _fill(pieces, [path / name for name in sorted(document["files"])])
    return whole


def _tensors_of(engine: Engine, ema: ShardedEma) -> dict[str, Tensor]:
    tensors = {"rng|torch|0": torch.get_rng_state()}
    for piece, shadow in zip(engine.fragments(), ema.shadow, strict=True):
        for kind, tensor in {**piece.tensors(), "ema": shadow}.items():
            tensors[f"{piece.name}|{kind}|{piece.start}"] = tensor.cpu().contiguous()
    return tensors


def _fill(pieces: list[Piece], files: list[Path]) -> None:
    """Copy into every piece its elements, opening files in order until nothing is missing."""
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
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read ({error})") from error
    for (name, kind), left in missing.items():
        if left:
            what = f"lacks {left} elements" if left > 0 else f"holds {-left} elements twice"
            raise CheckpointError(f"{files[0].parent} {what} of {kind} of {name}")


def _keys(reader: Any) -> Iterator[tuple[str, str, int]]:
    for key in reader.keys():  # noqa: SIM118  (a safetensors reader is not a mapping)
        name, kind, start = key.rsplit("|", 2)
        yield name, kind, int(start)


def _copy(piece: Piece, stored: Any, start: int) -> int:
    """Copy the overlap of `stored` (elements from `start` on) into the piece; how many elements that were."""
    begin = max(piece.start, start)
    end = min(piece.start + piece.target.numel(), start + stored.get_shape()[0])
    if begin >= end:
        return 0
    piece.target[begin - piece.start : end - piece.start].copy_(stored[begin - start : end - start])
    return end - begin


def _same_parameters(
    path: Path, stored: Mapping[str, list[int]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(set(stored) | set(expected)):
        ours = list(expected[name]) if name in expected else None
        if stored.get(name) != ours:
            raise CheckpointError(
                f"{path} is of another model: {name} is {stored.get(name)} there and {ours} here"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(path: Path, name: str) -> Path:
    target = path.with_name(name)
    _remove(target)
    return path.rename(target)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
