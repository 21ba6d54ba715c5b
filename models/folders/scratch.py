"""A scratch: a folder next to the results, in which one process builds them; mode 0700, a name of 128 random bits.

        PARENT/.flowmask-<hex>/lock-<hex>   held by its maker; if it is free, anybody may clear the scratch
        PARENT/.flowmask-<hex>/.swap.json   the moves of a swap (output_folder.py), to undo an interrupted one

A folder without a lock of the same name is not FlowMask's.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flowmask.models.errors import ConfigError
from flowmask.models.files import read_object
from flowmask.models.folders import locks

FILES = ".flowmask.files"
SWAP, OLD = ".swap.json", ".old"
_SCRATCH = re.compile(r"\.flowmask-([0-9a-f]{32})")


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent`, only for this process, removed at the end.

    Scratches of dead processes are removed too.
    """
    clear(parent, undo=False)
    place, lock, handle = _new_scratch(parent)
    try:
        yield place
    finally:
        if not _is_unfinished(place):  # a failed undo; the next holder of the lock repeats it
            _remove(place, lock)
        os.close(handle)


def _new_scratch(parent: Path) -> tuple[Path, Path, int]:
    while True:
        name = secrets.token_hex(16)
        place = parent / f".flowmask-{name}"
        place.mkdir(mode=0o700)
        lock = place / f"lock-{name}"
        with suppress(FileNotFoundError):  # another process took it for dead while it was empty
            try:
                handle = locks.take(lock)
            except locks.LockError:  # a file system without locks: only its maker removes it there
                return place, lock, os.open(lock, os.O_RDWR)
            if handle is not None and lock.exists():
                return place, lock, handle
            if handle is not None:
                os.close(handle)


def clear(parent: Path, *, undo: bool) -> None:
    """Remove the scratches of dead processes. undo: also undo their swaps, which needs the lock of the folder."""
    for entry in list(os.scandir(parent)):
        name = _SCRATCH.fullmatch(entry.name)
        with suppress(FileNotFoundError):  # its maker is removing it
            if name and entry.is_dir(follow_symlinks=False) and entry.stat().st_uid == os.geteuid():
                _clear_one(parent, Path(entry.path), Path(entry.path, f"lock-{name[1]}"), undo=undo)


def _clear_one(parent: Path, place: Path, lock: Path, *, undo: bool) -> None:
    if not lock.exists():
        with suppress(OSError):  # empty: its maker died or makes another one; else not FlowMask's
            place.rmdir()
        return
    if (place / SWAP).exists() and not undo:
        return
    if not locks.is_free(lock) or (handle := locks.take(lock, patience_s=0)) is None:
        return
    try:
        if _is_unfinished(place):
            undo_swap(parent, place)
        _remove(place, lock)
    finally:
        os.close(handle)


def _is_unfinished(place: Path) -> bool:
    """Whether a swap has begun here and not ended: the listing is moved last."""
    return (place / SWAP).exists() and (place / FILES).exists()


def undo_swap(out: Path, place: Path) -> None:
    """Undo an interrupted swap; can be repeated after a kill."""
    for name, source in read_object(place / SWAP).items():
        _refuse_outside(out, name, source)
        if not os.path.lexists(out / source) and os.path.lexists(out / name):
            (out / name).rename(out / source)
    for old in list((place / OLD).iterdir()):
        if not os.path.lexists(out / old.name):
            old.rename(out / old.name)
    (place / SWAP).unlink()


def _refuse_outside(out: Path, name: str, source: str) -> None:
    """ConfigError if another user's plan moves files from or to a place outside the folder."""
    inside = isinstance(source, str) and (out / source).parent.resolve().is_relative_to(out.resolve())
    if not inside or ".." in Path(source).parts or Path(name).name != name:
        raise ConfigError(
            f"{out} holds a plan of moves that leads out of it ({source}); it is not from FlowMask: remove it"
        )


def _remove(place: Path, lock: Path) -> None:
    """Delete a scratch; its lock goes last, so that other processes still recognise the scratch."""
    for path in list(place.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path != lock:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        lock.unlink(missing_ok=True)
        place.rmdir()
