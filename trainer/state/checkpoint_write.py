"""One rank's side of a save: host copies, a background thread that writes them, and the renames that publish them.

A snapshot is taken between two steps; the thread then writes only from it, so training continues at once. No
collective runs in a thread. A complete checkpoint is renamed into place; an old one is renamed away
before it is deleted. So a kill at any moment keeps the last complete checkpoint.
"""

import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flowmask.models.errors import WeightsError, help_of_disk
from flowmask.models.files import remove_known, sha256_of, sync
from flowmask.models.stored.sealed import seal_readable
from flowmask.models.strict import refuse_not_finite
from flowmask.trainer.state.steps import complete, step_of
from flowmask.trainer.step.ema import ShardedEma
from flowmask.trainer.step.engine import Engine

_TRASH = ".trash_"
_BESIDE = re.compile(rf"\.writing_step_\d{{8,}}_\d+|{re.escape(_TRASH)}step_\d{{8,}}|\.link_(latest|best)")
_OURS = re.compile(r"rank_\d{5}\.safetensors|state\.json")
_CHUNK = 1 << 26  # elements of one host buffer; pinned memory is allocated in powers of two


class Snapshot:
    """Host copies of this rank's fragments and EMA; the buffers are reused."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._tensors: dict[str, Tensor] = {}
        self._copied: Any = None  # a CUDA event: the writer waits for the copies, not the training

    def take(self, engine: Engine, ema: ShardedEma) -> None:
        """Copy the state between two steps; on a GPU the copies are only queued, before the next step."""
        live = {}
        for piece, shadow in zip(engine.fragments(), ema.shadow, strict=True):
            for kind, tensor in {**piece.tensors(), "ema": shadow}.items():
                live[f"{piece.name}|{kind}|{piece.start}"] = tensor
        if self._tensors.keys() != live.keys():
            self._tensors = self._allocate(live)
        for key, tensor in live.items():
            self._tensors[key].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._random = torch.get_rng_state()

    def _allocate(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Allocate `live` in a few large host buffers, page-locked if there is a GPU."""
        places = {}
        self._buffers, room = [], 0
        left = sum(tensor.numel() for tensor in live.values())
        for key, tensor in live.items():
            n = tensor.numel()
            if n > room:
                room = max(n, min(_CHUNK, left))
                self._buffers.append(torch.empty(room, pin_memory=torch.cuda.is_available()))
            places[key] = self._buffers[-1].narrow(0, self._buffers[-1].numel() - room, n)
            room, left = room - n, left - n
        return places

    def write(self, path: Path) -> dict[str, Any]:
        """Write and sync the file; returns its size and hash.

        Raises WeightsError for a non-finite number, without writing.
        """
        if self._copied is not None:
            self._copied.synchronize()
        tensors = ((" of ".join(key.split("|")[1::-1]), tensor) for key, tensor in self._tensors.items())
        refuse_not_finite(tensors, where="the training", fix="start a new run with a lower train.lr")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"rng|torch|0": self._random, **self._tensors}, path)
        sync(path)
        return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


class Background:
    """A call in a daemon thread. It may end with the process, because a save must survive a kill anyway."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._result: Any = None
        self._problem: str | None = None
        self._bug: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._result = self._call()
        except (OSError, SafetensorError) as error:
            self._problem = f"{' '.join(str(error).split())}; earlier checkpoints are kept; {help_of_disk(error)}"
        except WeightsError as error:
            self._problem = f"{error}; earlier checkpoints are kept"
        except BaseException as error:  # noqa: BLE001 - `outcome` raises it again
            self._bug = error

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def outcome(self) -> tuple[Any, str | None]:
        """Wait; returns (result, None), or (None, the reason why nothing was written and the fix)."""
        self._thread.join()
        if self._bug is not None:
            raise self._bug
        return self._result, self._problem


def publish(beside: Path, final: Path, *, document: dict[str, Any], links: tuple[str, ...]) -> None:
    """Rename `beside` to the checkpoint `final`, and point `links` to it."""
    (beside / "state.json").write_bytes(seal_readable(document))
    sync(beside / "state.json")
    sync(beside)
    if final.exists():
        old = _to_trash(final)
        beside.replace(final)
        remove(old)
    else:
        beside.replace(final)
    sync(final.parent)
    for name in links:
        point_to(final, name)
    sync(final.parent)


def point_to(checkpoint: Path, name: str) -> None:
    """Point the link `name` in the folder of `checkpoint` to it, atomically."""
    link = checkpoint.parent / f".link_{name}"
    remove(link)
    link.symlink_to(checkpoint.name)
    link.replace(checkpoint.parent / name)


def prune(folder: Path, *, keep_last: int, milestone_every_steps: int | None) -> None:
    """Delete old checkpoints, except milestones and targets of links."""
    pinned = {(folder / name).resolve().name for name in ("latest", "best")}
    every = milestone_every_steps
    others = [path for path in complete(folder) if not every or step_of(path) % every]
    for old in others[keep_last:]:
        if old.name not in pinned:
            remove(_to_trash(old))


def _to_trash(path: Path) -> Path:
    target = path.with_name(f"{_TRASH}{path.name}")
    remove(target)
    return path.replace(target)


def clean(folder: Path) -> None:
    """Remove the partial files of a killed process."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if _BESIDE.fullmatch(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Delete FlowMask's link, or its files in a folder; foreign files in a checkpoint are moved back."""
    if path.is_symlink():
        path.unlink()
    if not path.is_dir():
        return
    remove_known(path, lambda name: bool(_OURS.fullmatch(name)))
    if path.exists() and path.name.startswith(_TRASH):
        place = path.with_name(path.name.removeprefix(_TRASH))
        place.mkdir(exist_ok=True)
        for entry in list(path.iterdir()):
            entry.rename(place / entry.name)
        path.rmdir()
