"""A large JSON object, member by member: memory holds one member at a time; the position of each can be kept.

So a mask file of hundreds of MB is checked once, completely, and later read by ranges. Refuses everything that
Python's json refuses, and a name that occurs twice in one object.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from flowmask.data_pipeline.formats.json_file import BOM, parse
from flowmask.data_pipeline.formats.reading import open_file, reading
from flowmask.models.errors import DataError

_CHUNK = 1 << 20
_SPACE = " \t\n\r"
_AFTER_A_VALUE = frozenset(f"{_SPACE},:]}}")


@dataclass(frozen=True)
class Member:
    """One member of an object; starts and lengths are the bytes of its value and its name in the file."""

    name: str
    value: Any
    start: int
    length: int
    name_start: int
    name_length: int


def members(path: Path, *, field: str | None = None) -> Iterator[Member]:
    """Members of the object in a file, or of its field `field`, in order.

    Raises DataError if the file is missing or invalid, is no object, or has no such field.
    """
    with reading(path, what="JSON") as file:
        yield from _members(_Scanner(file), path, field)


def _members(scanner: "_Scanner", path: Path, field: str | None) -> Iterator[Member]:
    if scanner.peek() != "{":
        scanner.value()
        scanner.end()
        raise DataError(f"{path}: expected an object of {'annotation ids' if field is None else 'fields'}")
    found = False
    for name in scanner.names():
        if field is None:
            yield scanner.member()
        elif name == field and scanner.peek() == "{":
            found = True
            for _ in scanner.names():
                yield scanner.member()
        elif name == field:
            raise DataError(f"{path}.{name} is {str(scanner.value())[:40]!r}; expected a dict")
        else:
            scanner.value()
    scanner.end()
    if field is not None and not found:
        raise DataError(f"{path} has no field {field!r}")


class _Scanner:
    """Reads JSON from a file through a window.

    Latin-1 decodes each byte to one character, so positions are byte offsets.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._text, self._at, self._offset, self._chunk = "", 0, 0, _CHUNK
        self._decoder, self._name = json.JSONDecoder(), ("", 0, 0)
        self._whole = False
        if file.read(len(BOM)) == BOM:
            self._offset = len(BOM)
        else:
            file.seek(0)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, expected: str) -> None:
        if (found := self.peek()) != expected:
            what = repr(found) if found else "the end"
            raise ValueError(f"expected {expected!r}, found {what} at byte {self._offset + self._at}")
        self._at += 1

    def names(self) -> Iterator[str]:
        """Names of the members of an object; the caller reads the value of each before the next name."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        seen = set()
        while True:
            if self.peek() != '"':
                self.take('"')
            self._name = self._parsed()
            if self._name[0] in seen:
                raise ValueError(f"the key {self._name[0][:40]!r} is in one object twice")
            seen.add(self._name[0])
            self.take(":")
            yield self._name[0]
            if self.peek() != ",":
                break
            self.take(",")
        self.take("}")

    def member(self) -> Member:
        """The value of the last name that `names` yielded."""
        name, name_start, name_length = self._name
        value, start, length = self._parsed()
        return Member(name, value, start, length, name_start, name_length)

    def value(self) -> Any:
        return self._parsed()[0]

    def end(self) -> None:
        if self.peek():
            raise ValueError(f"extra data at byte {self._offset + self._at}")

    def _parsed(self) -> tuple[Any, int, int]:
        """The next value and its position; the window grows until it contains the whole value."""
        self.peek()
        while True:
            try:
                _, stop = self._decoder.raw_decode(self._text, self._at)
                # The end of a number may lie beyond the window.
                complete = self._whole or self._text[stop : stop + 1] in _AFTER_A_VALUE
            except ValueError:
                if self._whole:
                    raise
                complete = False
            if complete:
                break
            self._more()
        raw = self._text[self._at : stop].encode("latin-1")
        start, self._at = self._offset + self._at, stop
        return parse(raw), start, len(raw)

    def _more(self) -> bool:
        """Move the window forward; text before the next value is dropped."""
        content = self._file.read(max(self._chunk, len(self._text) - self._at))
        self._whole = not content
        self._offset += self._at
        self._text, self._at = self._text[self._at :] + content.decode("latin-1"), 0
        return bool(content)


class Places:
    """Positions of a file's members by name, in a few bytes each."""

    def __init__(self, path: Path, found: Iterable[tuple[Member, int]]):
        """found: each member, with a number from the caller."""
        self._path = path
        names, numbers = [b""], array("q", (0, 0, 0))
        for member, number in found:
            names.append(_key(member.name))
            numbers.extend((member.start, member.length, number))
        order = np.argsort(np.array(names, dtype="S"), kind="stable")
        self._names = np.array(names, dtype="S")[order]
        self._numbers = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 3)[order]

    def number(self, name: str) -> int | None:
        """The caller's number for a member; None if no member has this name."""
        place = self._place(name)
        return None if place is None else int(self._numbers[place, 2])

    def read(self, name: str) -> Any:
        """The value of a member that exists, read again."""
        place = self._place(name)
        assert place is not None, f"{self._path} has no {name}"
        return read_range(self._path, int(self._numbers[place, 0]), int(self._numbers[place, 1]))

    def _place(self, name: str) -> int | None:
        key = np.bytes_(_key(name))
        place = int(np.searchsorted(self._names, key))
        return place if place < len(self._names) and self._names[place] == key else None


def _key(name: str) -> bytes:
    """A name of any length in 32 bytes, so that one array holds all names."""
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16).hexdigest().encode()


def read_range(path: Path, start: int, length: int) -> Any:
    """The JSON value in a range of a file; DataError if the file has changed since it was scanned."""
    try:
        with open_file(path) as file:
            file.seek(start)
            return json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: changed or unreadable since the build began ({error})") from error
