"""Predictions for the users of the page: one at a time, each in a folder that is removed when its user leaves.

Does not use Gradio. Manages the users, their turns, and the files in the folder. A user ("person") is an open tab of
the page, identified by a name.
"""

import json
import os
import secrets
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flowmask.launch.serve.limits import LimitError, Limits, shown_frames
from flowmask.models.errors import UserError

if TYPE_CHECKING:
    from flowmask.trainer.predict.predict import Predictions

KEPT_S = 3600.0  # time after which files of users who did not close the page are removed
STRAY_S = 60.0  # time after which an unfinished upload without new data is removed
_SHOWN = 6  # masks of each sentence on the page
_LOOKS_S = 0.2  # seconds between two checks whether a waiting user has left
Tell = Callable[[str, int, int], None]  # what, done, total


class PersonLeftError(Exception):
    """The user has left, so the result has no reader."""


@dataclass(frozen=True)
class Found:
    """The result files of a request.

    masks:      for each sentence: some frames by title, each with its PNG
    everything: zip of masks, predictions.json and overlays
    """

    overlay: Path
    masks: dict[str, dict[str, Path]]
    everything: Path
    notes: list[str]


@dataclass(eq=False)
class _Person:
    """A user with the page open. uploads: clips that they uploaded or chose; places: folders of results."""

    left: threading.Event = field(default_factory=threading.Event)
    uploads: set[Path] = field(default_factory=set)
    places: set[Path] = field(default_factory=set)
    busy: bool = False
    seen: float = field(default_factory=time.monotonic)


class WaitingLine:
    """A queue that admits one request at a time, in order of arrival."""

    def __init__(self, most_waiting: int) -> None:
        self._line: list[object] = []
        self._moved = threading.Condition()
        self._most_waiting = most_waiting

    @contextmanager
    def turn(self, on_wait: Callable[[int], None]) -> Iterator[None]:
        """Wait for a turn; the block holds it. on_wait: receives the number of requests ahead; may raise to leave."""
        ticket = object()
        with self._moved:
            if len(self._line) > self._most_waiting:
                raise LimitError(
                    f"{len(self._line)} requests are ahead of yours, which is the maximum: try again later"
                )
            self._line.append(ticket)
        try:
            with self._moved:
                while before := self._line.index(ticket):
                    on_wait(before)
                    self._moved.wait(_LOOKS_S)
            yield
        finally:
            with self._moved:
                self._line.remove(ticket)
                self._moved.notify_all()


class Service:
    """The operations of the page. Any thread may call its methods."""

    def __init__(
        self, segment: Callable[..., "Predictions"], *, folder: Path, clips: Mapping[str, Path], limits: Limits
    ):
        """segment: `predict` with weights and options bound; folder: for uploads and results only."""
        self.clips, self.limits = clips, limits
        self._segment, self._folder = segment, folder
        self._turns, self._people, self._lock = WaitingLine(limits.waiting), dict[str, _Person](), threading.Lock()
        self._leaving = list[_Person]()  # users who left while their request still reads its clip

    def look(self, who: str, video: Path) -> str:
        """Register an uploaded clip; returns a short description."""
        self._person(who, video)
        with _named(video):
            return self.limits.clip(video)

    def lend(self, who: str, name: str) -> Path:
        """Copy one of the offered clips for this user."""
        if name not in self.clips:
            raise LimitError(f"there is no clip {name!r}; choose one from the list")
        self.make_room()
        source = self.clips[name]
        copy = self._new_folder() / source.name
        shutil.copyfile(source, copy)
        self._person(who, copy)
        return copy

    def find(self, who: str, video: Path | None, text: str, *, tell: Tell) -> Found:
        """Segment the objects that the sentences name. Raises UserError, or PersonLeftError if the user left."""
        if video is None:
            raise LimitError("there is no clip; upload one first")
        sentences = self.limits.sentences_in(text)
        person = self._person(who, video)
        with self._lock:
            if person.left.is_set():
                raise PersonLeftError
            if person.busy:
                raise LimitError("your last request is still running; wait until it is done")
            person.busy = True

        def on_progress(what: str, done: int, total: int) -> None:
            if person.left.is_set():
                raise PersonLeftError
            tell(what, done, total)

        try:
            with self._turns.turn(lambda before: on_progress("requests before yours", 0, before)), _named(video):
                self.make_room()
                self.limits.clip(video)
                return self._found(person, video, sentences, on_progress)
        except UserError as error:
            if person.left.is_set():  # their clip was removed
                raise PersonLeftError from error
            raise
        finally:
            with self._lock:
                person.busy, person.seen = False, time.monotonic()
                gone = person.left.is_set()
                if gone:
                    self._leaving.remove(person)
            if gone:
                self._remove_files(person)

    def leave(self, who: str) -> None:
        """Called when a user closes the page: their request ends at its next step, and their files are removed."""
        with self._lock:
            person = self._people.pop(who, None)
            if person is None:
                return
            person.left.set()
            busy = person.busy
            if busy:
                self._leaving.append(person)
        if not busy:
            self._remove_files(person)

    def close(self, *, patience_s: float) -> None:
        """Remove all users. Waits at most `patience_s` seconds for the running request."""
        with self._lock:
            people = list(self._people.values())
        for who in list(self._people):
            self.leave(who)
        until = time.monotonic() + patience_s
        while any(person.busy for person in people) and time.monotonic() < until:
            time.sleep(0.02)

    def make_room(self) -> None:
        """Remove files older than KEPT_S. Raises LimitError if the folder is still full."""
        now = time.monotonic()
        with self._lock:
            late = [who for who, person in self._people.items() if not person.busy and now - person.seen > KEPT_S]
        for who in late:
            self.leave(who)
        with self._lock:
            people = [*self._people.values(), *self._leaving]
            held = {path.parent for person in people for path in person.uploads}.union(*(one.places for one in people))
        for entry in self._folder.iterdir():
            with suppress(FileNotFoundError):
                kept_s = KEPT_S if entry.is_dir() else STRAY_S
                if entry not in held and time.time() - entry.stat().st_mtime > kept_s:
                    _remove(entry)
        if _bytes_in(self._folder) > self.limits.kept_bytes:
            raise LimitError("the server has no room for more clips; try again later")

    def _person(self, who: str, video: Path) -> _Person:
        """The user, who now holds this clip."""
        if not video.resolve().is_relative_to(self._folder.resolve()) or not video.is_file():
            raise LimitError("the clip was removed from the server; upload it again")
        with self._lock:
            person = self._people.setdefault(who, _Person())
            person.uploads.add(video)
            person.seen = time.monotonic()
        return person

    def _found(self, person: _Person, video: Path, sentences: list[str], on_progress: Tell) -> Found:
        place, before, notes = self._new_folder(), set(person.places), list[str]()
        with self._lock:
            person.places.add(place)
        try:
            out = place / "predictions"
            made = self._segment(video, sentences, out=out, on_progress=on_progress, say=notes.append)
            shown = shown_frames(made.frame_names, _SHOWN)
            masks = {
                one.prompt: {f"frame {int(frame) + 1}": one.masks / f"{frame}.png" for frame in shown}
                for one in made.prompts
            }
            found = Found(made.overlay, masks, _packed(out, place / "flowmask.zip"), notes)
        except BaseException:
            self._remove_places(person, {place})
            raise
        self._remove_places(person, before)
        if person.left.is_set():
            raise PersonLeftError
        return found

    def _new_folder(self) -> Path:
        """A folder with an unguessable name: anyone who knows the path of a file may fetch it."""
        place = self._folder / secrets.token_hex(16)
        place.mkdir(mode=0o700)
        return place

    def _remove_files(self, person: _Person) -> None:
        with self._lock:
            others = {path for other in (*self._people.values(), *self._leaving) for path in other.uploads}
        for path in person.uploads - others:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                path.parent.rmdir()
        self._remove_places(person, set(person.places))

    def _remove_places(self, person: _Person, places: Set[Path]) -> None:
        with self._lock:
            person.places -= places
        for place in places:
            _remove(place)


@contextmanager
def _named(video: Path) -> Iterator[None]:
    """Inside the block, errors name the clip by its original name, not by its path here."""
    try:
        yield
    except UserError as error:
        raise LimitError(str(error).replace(str(video), video.name)) from error


def _packed(out: Path, path: Path) -> Path:
    """A zip of all results; predictions.json in it has file names instead of paths of this machine."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(out.rglob("*")):
            name = file.relative_to(out)
            if file.name == "predictions.json":
                archive.writestr(str(name), _without_paths(file.read_text()))
            elif file.is_file() and not file.name.startswith("."):
                archive.write(file, name)
    return path


def _without_paths(text: str) -> str:
    said = json.loads(text)
    for entry in (said, *said["prompts"]):
        entry |= {key: Path(entry[key]).name for key in ("video", "checkpoint") if key in entry}
    return json.dumps(said, indent=1, ensure_ascii=False)


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
