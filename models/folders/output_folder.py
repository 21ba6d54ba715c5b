"""The folder that a command writes its results to: new, empty, or one of ours of the same kind; else it is refused.

    OUT/.flowmask.json    the mark: kind and identity; made before anything else
    OUT/.flowmask.files   every file of the results that are swapped in whole, with its SHA-256
    OUT/.lock             held by the one process that writes here now
    OUT/.flowmask-<hex>/  a scratch: where one process builds its results, mode 0700; also beside a single file

What is not listed is not ours: it is never replaced or deleted. Results change by renames alone, and a swap that was
cut short is undone by whoever holds the lock next, so older results go when the new ones stand.
"""

import errno
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flowmask.models.errors import ConfigError, UserError
from flowmask.models.files import MARK, TEMPORARY, move_new, read_object, sha256_of, sync, write_atomically
from flowmask.models.folders import locks

LOCK, FILES = ".lock", ".flowmask.files"
PATIENCE_S = 15.0
_SWAP, _OLD = ".swap.json", ".old"
_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG)
_SCRATCH = re.compile(r"\.flowmask-([0-9a-f]{32})")


@dataclass(frozen=True)
class Kind:
    """What a folder of results can be.

    name:     with its article, as a sentence has it
    older:    of a folder without a mark, made by an earlier version: the files of ours, all of which parse as this
              kind, by relative path; None if the folder is not of this kind
    dots:     names of ours that start with a dot; others of that form are left alone and do not count
    identity: of every folder of this kind; empty: a random one each
    """

    name: str
    older: Callable[[Path], Collection[str] | None]
    dots: tuple[str, ...] = ()
    error: type[UserError] = ConfigError
    identity: str = ""


class OutputFolder:
    """A folder of results that is ours, made where it is missing; `kind.error` in one line where it is not."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path, self.kind = path, kind
        with self._said():
            path.mkdir(parents=True, exist_ok=True)
            found = _read_mark(path) or self._mark()
        if found.get("kind") != kind.name:
            what = found.get("kind") or f"marked by a damaged {MARK}"
            raise kind.error(f"out is {path}, which is {what}, not {kind.name}; choose another folder")
        with self._said():
            _clear(path, undo=False)
            self._sweep(found["id"])

    def _mark(self) -> dict[str, str]:
        """Make the folder ours if it is empty, or was ours before there were marks."""
        own = {LOCK, FILES, *self.kind.dots}
        names = sorted(entry.name for entry in self.path.iterdir() if entry.name[0] != "." or entry.name in own)
        files = self.kind.older(self.path) if names else ()
        if files is None:
            if found := _read_mark(self.path):  # another process has begun here just now
                return found
            raise self.kind.error(
                f"out is {self.path}, which is not {self.kind.name} but holds {names[0]}; choose a new or empty folder"
            )
        if files:
            write_atomically(self.path / FILES, json.dumps(dict.fromkeys(files, "")))
        mark = {"kind": self.kind.name, "id": self.kind.identity or secrets.token_hex(16)}
        with scratch(self.path) as place, suppress(FileExistsError):  # somebody was quicker: that mark holds
            write_atomically(place / MARK, json.dumps(mark))
            move_new(place / MARK, self.path / MARK)
        return _read_mark(self.path) or {}

    @contextmanager
    def held(self, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
        """Be the one writer inside the block."""
        handle = self.take(patience_s=patience_s)
        try:
            yield
        finally:
            os.close(handle)

    def take(self, *, patience_s: float = PATIENCE_S) -> int:
        """Be the one writer until the open file that this returns is closed, or this process ends.

        Undoes what a writer that died has left half done; `kind.error` names who is at work here.
        """
        with self._said():
            handle = locks.take(self.path / LOCK, patience_s=patience_s)
        if handle is None:
            holder = ""
            with suppress(OSError):
                holder = (self.path / LOCK).read_text(errors="replace").strip()
            raise self.kind.error(
                f"{self.path} is being written by {holder or 'an unknown process'}; stop it or choose another out "
                f"(waited {patience_s:.0f} s)"
            )
        with suppress(OSError):  # a full disk: it is held all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            with self._said():
                _clear(self.path, undo=True)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def strangers(self, names: Collection[str], *, by_content: bool = False) -> list[str]:
        """Files under these names that no result of ours put there, or (by_content) that somebody has changed."""
        known, found = self._files(), []
        for name in names:
            for path in _below(self.path / name):
                relative = path.relative_to(self.path).as_posix()
                same = relative in known and path.is_file() and not path.is_symlink()
                if same and by_content and known[relative]:
                    same = sha256_of(path) == known[relative]
                found += [] if same else [relative]
        return found

    def refuse_strangers(self, names: Collection[str], *, by_content: bool = False) -> None:
        """`kind.error` if results of these names would take the place of somebody else's file."""
        if found := self.strangers(names, by_content=by_content):
            raise self.kind.error(
                f"{self.path / found[0]} is no result of FlowMask, or was changed; move it away, or choose another out"
            )

    def swap(self, place: Path, moves: Mapping[str, Path], *, index: str, gone: Collection[str] = ()) -> None:
        """Put new results in place of older ones: all, or none if anything fails. Call it inside `held`.

        place: a scratch in this folder; moves: name -> what becomes it, anywhere in this folder
        index: the name that readers trust, away first and there last; gone: names of older results without new ones
        """
        with self._said():
            names = [index, *sorted({*moves, *gone} - {index})]
            self.refuse_strangers(names, by_content=True)
            files = {file: sha for file, sha in self._files().items() if file.split("/")[0] not in names}
            for name, source in moves.items():
                for path in _below(source):
                    files[(Path(name) / path.relative_to(source)).as_posix()] = sha256_of(path)
            write_atomically(place / FILES, json.dumps(files))
            moves = {FILES: place / FILES, **{name: moves[name] for name in names if name in moves}}
            plan = {name: source.relative_to(self.path).as_posix() for name, source in moves.items()}
            (place / _OLD).mkdir()
            write_atomically(place / _SWAP, json.dumps(plan))
            try:
                for name in (*names, FILES):
                    if os.path.lexists(self.path / name):
                        (self.path / name).rename(place / _OLD / name)
                for name in reversed(moves):
                    moves[name].rename(self.path / name)
                sync(self.path)
            except OSError:
                _undo(self.path, place)
                raise

    def _files(self) -> dict[str, str]:
        return read_object(self.path / FILES)

    def _sweep(self, identity: str) -> None:
        """Delete single files that writers who died never finished: they carry this folder's identity."""
        name = re.compile(rf"{re.escape(TEMPORARY)}.*\.{re.escape(identity)}[0-9a-f]{{16}}", re.DOTALL)
        for entry in list(os.scandir(self.path)):
            ours = name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
            if ours and not locks.is_held(Path(entry.path)):
                Path(entry.path).unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A scratch here; a disk that is full while it is being filled is one line."""
        with self._said(_DISK_REFUSES), scratch(self.path) as place:
            yield place

    @contextmanager
    def _said(self, only: tuple[int, ...] = ()) -> Iterator[None]:
        """What the disk refuses, in one line."""
        try:
            yield
        except OSError as error:
            if only and error.errno not in only:
                raise
            raise self.kind.error(
                f"out is {self.path}; it can't be written ({error.strerror or error}): make room, or choose another"
            ) from error


def identity_of(folder: Path) -> str | None:
    """The identity of a folder of ours, which a copy has too; None without a mark."""
    return _read_mark(folder).get("id")


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent` that this process alone may enter, gone at the end; those of dead ones go too."""
    _clear(parent, undo=False)
    place, lock, handle = _new_scratch(parent)
    try:
        yield place
    finally:
        if not _is_unfinished(place):  # a swap that could not be undone either: the next holder of the lock does it
            _remove(place, lock)
        os.close(handle)


def _new_scratch(parent: Path) -> tuple[Path, Path, int]:
    while True:
        name = secrets.token_hex(16)
        place = parent / f".flowmask-{name}"
        place.mkdir(mode=0o700)
        lock = place / f"lock-{name}"
        with suppress(FileNotFoundError):  # somebody took it for a dead one's: it was empty still
            handle = locks.take(lock)
            if handle is not None and lock.exists():
                return place, lock, handle
            if handle is not None:
                os.close(handle)


def _clear(parent: Path, *, undo: bool) -> None:
    """Remove the scratches of processes that died. undo: end their swaps too, which takes the lock of the folder."""
    for entry in list(os.scandir(parent)):
        name = _SCRATCH.fullmatch(entry.name)
        with suppress(FileNotFoundError):  # its maker is just removing it
            if name and entry.is_dir(follow_symlinks=False) and entry.stat().st_uid == os.geteuid():
                _clear_one(parent, Path(entry.path), Path(entry.path, f"lock-{name[1]}"), undo=undo)


def _clear_one(parent: Path, place: Path, lock: Path, *, undo: bool) -> None:
    if not lock.exists():
        with suppress(OSError):  # empty: its maker died, or makes another one. Else it is not ours
            place.rmdir()
        return
    if (place / _SWAP).exists() and not undo:
        return
    handle = locks.take(lock, patience_s=0)
    if handle is None:
        return
    try:
        if _is_unfinished(place):
            _undo(parent, place)
        _remove(place, lock)
    finally:
        os.close(handle)


def _is_unfinished(place: Path) -> bool:
    """Whether a swap has begun here and not ended: the listing is the last thing that it moves."""
    return (place / _SWAP).exists() and (place / FILES).exists()


def _undo(out: Path, place: Path) -> None:
    """Take a swap back as far as it has come; again after a kill, with the same end."""
    for name, source in read_object(place / _SWAP).items():
        _refuse_outside(out, name, source)
        if not os.path.lexists(out / source) and os.path.lexists(out / name):
            (out / name).rename(out / source)
    for old in list((place / _OLD).iterdir()):
        if not os.path.lexists(out / old.name):
            old.rename(out / old.name)
    (place / _SWAP).unlink()


def _refuse_outside(out: Path, name: str, source: str) -> None:
    """A plan that a stranger wrote moves nothing from or to a place outside the folder."""
    inside = isinstance(source, str) and (out / source).parent.resolve().is_relative_to(out.resolve())
    if not inside or ".." in Path(source).parts or Path(name).name != name:
        raise ConfigError(f"{out} holds a plan of moves that leads out of it ({source}); it is not ours: remove it")


def _remove(place: Path, lock: Path) -> None:
    """Delete a scratch, its lock at the end: until then the next one knows it for ours."""
    for path in list(place.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path != lock:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        lock.unlink(missing_ok=True)
        place.rmdir()


def _below(path: Path) -> Iterator[Path]:
    """The files of a result: itself, or all below it; links are files."""
    if path.is_symlink() or not path.is_dir():
        yield from [path] if os.path.lexists(path) else []
        return
    for place, folders, names in os.walk(path):
        yield from (Path(place, name) for name in names)
        yield from (link for name in folders if (link := Path(place, name)).is_symlink())


def _read_mark(folder: Path) -> dict[str, str]:
    """The mark of a folder; empty without one, and without a kind if it is damaged."""
    found = read_object(folder / MARK)
    if not found and not os.path.lexists(folder / MARK):
        return {}
    return {key: found[key] if isinstance(found.get(key), str) else "" for key in ("kind", "id")}
