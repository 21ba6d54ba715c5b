"""One-line errors for unreadable files of a dataset, and one line for several mistakes."""

import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from flowmask.models.errors import DataError
from flowmask.models.stored.regular import open_regular

_SHOWN = 5


@contextmanager
def reading(
    path: Path, *, what: str, errors: tuple[type[Exception], ...] = (ValueError, RecursionError)
) -> Iterator[IO[bytes]]:
    """The open file; DataError if it is missing, can't be read, or (by one of `errors`) is no valid `what`."""
    try:
        with open_file(path) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path} is missing; see docs/datasets.md for the files of a dataset") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except errors as error:
        raise DataError(f"{path}: no valid {what} ({' '.join(str(error).split()) or type(error).__name__})") from error


def open_file(path: Path) -> IO[bytes]:
    """A regular file open for reading; OSError for a folder, a pipe or a device, which could block without end."""
    return os.fdopen(open_regular(path), "rb")


def shown(value: Any) -> str:
    """The beginning of a value from a file, for an error message."""
    try:
        return (value if isinstance(value, str) else reprlib.repr(value))[:40]
    except ValueError:  # a number of thousands of digits
        return f"no short {type(value).__name__}"


class SeveralMistakesError(DataError):
    """Mistakes of one dataset in one line: the first few, and the number of the rest."""

    def __init__(self, said: list[str], count: int):
        self.said, self.count = said, count
        more = f"; and {count - len(said)} more" if count > len(said) else ""
        super().__init__("; ".join([f"{count} mistakes: {said[0]}", *said[1:]]) + more)


class Mistakes:
    """Gathers the DataErrors of `with` blocks, so that a person sees all of them at once."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._count = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if not isinstance(error, DataError):
            return False
        several = error if isinstance(error, SeveralMistakesError) else SeveralMistakesError([str(error)], 1)
        self._said = [*self._said, *several.said][:_SHOWN]
        self._count += several.count
        return True

    def refuse(self) -> None:
        """DataError if there was a mistake."""
        if self._count:
            raise DataError(self._said[0]) if self._count == 1 else SeveralMistakesError(self._said, self._count)
