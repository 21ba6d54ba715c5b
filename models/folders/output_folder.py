"""A command's folder of results: it must be new, empty, or FlowMask's of the same kind.

    OUT/.flowmask.json    the mark: kind and identity; made before anything else
        OUT/.flowmask.files   every file of results that are replaced together, with its SHA-256
        OUT/.lock             held by the one process that writes here now
        OUT/.flowmask-<hex>/  a scratch: one process builds its results here, mode 0700; also next to a single file

Files that are not listed are not FlowMask's and are never replaced or deleted. Results change only by renames. The next
holder of the lock undoes an interrupted swap, so older results disappear only when the new ones exist.
"""

import errno
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flowmask.models.errors import ConfigError, UserError, help_of_disk
from flowmask.models.files import MARK, TEMPORARY, move_new, read_object, sha256_of, sync, write_atomically
from flowmask.models.folders import locks
from flowmask.models.folders.scratch import FILES, OLD, SWAP, clear, scratch, undo_swap

LOCK = ".lock"
PATIENCE_S = 15.0
_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Kind:
    """A kind of folder of results.

    name:     with its article, for sentences
    older:    for a folder of an earlier version without a mark: its FlowMask files by relative path, if all of them
              parse as this kind; None if the folder is not of this kind
    dots:     FlowMask's names that start with a dot; other such names are ignored
    identity: of every folder of this kind; empty: a random one for each
    """

    name: str
    older: Callable[[Path], Collection[str] | None]
    dots: tuple[str, ...] = ()
    error: type[UserError] = ConfigError
    identity: str = ""


class OutputFolder:
    """A folder of results of FlowMask, created if missing; raises `kind.error` if it is another folder."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path, self.kind = path, kind
        with self._said():
            path.mkdir(parents=True, exist_ok=True)
            files = own_files(path, kind)
            if files is not None:
                self._mark(files)
            self._identity = _read_mark(path).get("id", "")
            clear(path, undo=False)
            self._sweep()

    def _mark(self, files: Collection[str]) -> None:
        """Mark the folder; `files`: those of an earlier version."""
        if files:
            write_atomically(self.path / FILES, json.dumps(dict.fromkeys(files, "")))
        mark = {"kind": self.kind.name, "id": self.kind.identity or secrets.token_hex(16)}
        with scratch(self.path) as place, suppress(FileExistsError):  # another process was faster: its mark counts
            write_atomically(place / MARK, json.dumps(mark))
            move_new(place / MARK, self.path / MARK)

    @contextmanager
    def held(self, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
        """Hold the writer's lock inside the block."""
        handle = self.take(patience_s=patience_s)
        try:
            yield
        finally:
            os.close(handle)

    def take(self, *, patience_s: float = PATIENCE_S) -> int:
        """Take the writer's lock until the returned open file is closed or this process ends.

        Undoes the interrupted swap of a dead writer; `kind.error` names another active writer.
        """
        with self._said():
            handle = locks.take(self.path / LOCK, patience_s=patience_s)
        if handle is None:
            raise self.kind.error(
                f"{self.path} is being written by {self._holder()}; stop it or choose another out "
                f"(waited {patience_s:.0f} s)"
            )
        with suppress(OSError):  # a full disk: the lock is held anyway
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            with self._said():
                clear(self.path, undo=True)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _holder(self) -> str:
        """The holder of the lock, according to the lock file."""
        if not locks.is_held(self.path / LOCK):
            return f"nobody, but a process that reads holds its lock (`fuser {self.path / LOCK}` names it)"
        with suppress(OSError):
            return (self.path / LOCK).read_text(errors="replace").strip() or "an unknown process"
        return "an unknown process"

    def strangers(self, names: Collection[str], *, by_content: bool = False) -> list[str]:
        """Files with these names that are not FlowMask's results, or (by_content) were changed."""
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
        """`kind.error` if results with these names would replace other files."""
        if found := self.strangers(names, by_content=by_content):
            raise self.kind.error(
                f"{self.path / found[0]} is no result of FlowMask, or was changed; move it away, or choose another out"
            )

    def swap(self, place: Path, moves: Mapping[str, Path], *, index: str, gone: Collection[str] = ()) -> None:
        """Replace older results by new ones: all, or none if anything fails. Call it inside `held`.

        place: a scratch in this folder; moves: name -> its new file or folder, anywhere in this folder
        index: the name that readers trust; it is removed first and put in last; gone: older results without new ones
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
            (place / OLD).mkdir()
            write_atomically(place / SWAP, json.dumps(plan))
            try:
                for name in (*names, FILES):
                    if os.path.lexists(self.path / name):
                        (self.path / name).rename(place / OLD / name)
                for name in reversed(moves):
                    moves[name].rename(self.path / name)
                sync(self.path)
            except OSError:
                undo_swap(self.path, place)
                raise

    def _files(self) -> dict[str, str]:
        return read_object(self.path / FILES)

    def _sweep(self) -> None:
        """Delete unfinished files of dead writers: their names contain this folder's identity."""
        name = re.compile(rf"{re.escape(TEMPORARY)}.*\.{re.escape(self._identity)}[0-9a-f]{{16}}", re.DOTALL)
        for entry in list(os.scandir(self.path)):
            ours = name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
            if ours and locks.is_free(Path(entry.path)):
                Path(entry.path).unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A scratch in this folder; a full disk during its use is a one-line error."""
        with self._said(_DISK_REFUSES), scratch(self.path) as place:
            yield place

    @contextmanager
    def _said(self, only: tuple[int, ...] = ()) -> Iterator[None]:
        """Inside the block, an error of the disk is one line."""
        try:
            yield
        except OSError as error:
            if only and error.errno not in only:
                raise
            why = f"it can't be written ({error.strerror or error})"
            raise self.kind.error(f"out is {self.path}; {why}: {help_of_disk(error)}, or choose another") from error


def own_files(path: Path, kind: Kind) -> Collection[str] | None:
    """None if the folder is marked as of this kind, else its files by `Kind.older`; writes nothing.

    Raises `kind.error` in one line if the folder is of another kind, or not FlowMask's.
    """
    if not (mark := _read_mark(path)):
        dots = {LOCK, FILES, *kind.dots}
        names = sorted(entry.name for entry in path.iterdir() if entry.name[0] != "." or entry.name in dots)
        files = kind.older(path) if names else ()
        if files is not None:
            return files
        if not (mark := _read_mark(path)):  # no other process has just marked it
            raise kind.error(
                f"out is {path}, which is not {kind.name} but holds {names[0]}; choose a new or empty folder"
            )
    if mark["kind"] != kind.name:
        what = mark["kind"] or f"marked by a damaged {MARK}"
        raise kind.error(f"out is {path}, which is {what}, not {kind.name}; choose another folder")
    return None


def identity_of(folder: Path) -> str | None:
    """The identity of a FlowMask folder, which a copy has too; None without a mark."""
    return _read_mark(folder).get("id")


def kind_in(folder: Path) -> str:
    """The kind in a folder's mark, with its article; empty without a mark, or with a damaged one."""
    return _read_mark(folder).get("kind", "")


def _below(path: Path) -> Iterator[Path]:
    """The files of a result: itself, or all files below it; links are files."""
    if path.is_symlink() or not path.is_dir():
        yield from [path] if os.path.lexists(path) else []
        return
    for place, folders, names in os.walk(path):
        yield from (Path(place, name) for name in names)
        yield from (link for name in folders if (link := Path(place, name)).is_symlink())


def _read_mark(folder: Path) -> dict[str, str]:
    """The mark of a folder; empty without one, and without a kind if it is damaged."""
    if not os.path.lexists(folder / MARK):  # asked first: another process may make it at any moment
        return {}
    found = read_object(folder / MARK)
    return {key: found[key] if isinstance(found.get(key), str) else "" for key in ("kind", "id")}
