"""Checks of the fields of a dataset's annotations; DataError names the field and its value."""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from flowmask.data_pipeline.formats.names import LONGEST_ID
from flowmask.data_pipeline.formats.reading import shown
from flowmask.models.errors import DataError
from flowmask.models.text import clean, has_words, is_unicode

_LARGEST_INT = 2**63 - 1
_LONGEST_PART = 255  # bytes of one part of a path


def check_expression(text: Any, *, where: str) -> str:
    """The sentence; DataError if it is no string, or is empty after cleaning."""
    if not isinstance(text, str):
        raise DataError(f"{where} is {shown(text)!r}; it must be a sentence")
    if not is_unicode(text):
        raise DataError(f"{where} is {text[:40]!r}: half a character (a lone surrogate), which no encoder reads")
    if not has_words(clean(text, lowercase=True)):
        raise DataError(f"{where} is {text[:40]!r}: an empty sentence; write one or remove the expression")
    return text


def check_name(value: Any, *, where: str) -> str:
    """The name of a file, a frame or an annotation; DataError if it can't be a file name or can't be printed."""
    name = str(value) if isinstance(value, str) or (is_int(value) and abs(value) <= _LARGEST_INT) else ""
    if not name.strip() or not name.isprintable():
        raise DataError(f"{where} is {shown(value)!r}; expected a name")
    if len(name) > LONGEST_ID:
        raise DataError(f"{where} is {name[:40]!r}...: a name of more than {LONGEST_ID} characters")
    return name


def check_names(values: Sequence[Any], *, where: str) -> list[str]:
    """Names of one list field, in its order."""
    return [check_name(value, where=f"{where}[{i}]") for i, value in enumerate(values)]


def check_path(name: str, *, where: str) -> str:
    """A path; DataError if a part of it is too long for a file name."""
    if any(len(part.encode()) > _LONGEST_PART for part in name.split("/")):
        raise DataError(f"{where} is {name[:40]!r}...; the name of a file has at most {_LONGEST_PART} bytes")
    return name


def check_inside(name: str, *, where: str) -> str:
    """The path of a file or folder below another one; raises DataError if it leads out of that folder."""
    if name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise DataError(
            f"{where} is {name[:40]!r}; expected a name below the dataset's folder, without empty parts or .."
        )
    return check_path(name, where=where)


def refuse_twice(names: Iterable[str], *, where: str, said: str = "appears twice") -> None:
    """DataError for the first name that occurs more than once."""
    name, times = next(iter(Counter(names).most_common(1)), ("", 0))
    if times > 1:
        raise DataError(f"{where}: {name[:40]!r} {said}")


def refuse_misspelt(entry: Any, known: Sequence[str], *, where: str) -> None:
    """DataError for a field that is probably meant to be a known one, which is missing; other fields are allowed."""
    absent = [name for name in known if name not in entry] if isinstance(entry, dict) else []
    for name in entry if absent else ():
        if name not in known and (near := difflib.get_close_matches(name, absent, n=1, cutoff=0.8)):
            raise DataError(f"{where} has an unknown field {name[:40]!r}; did you mean {near[0]!r}?")


def is_int(value: Any) -> bool:
    """Whether this is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def field(entry: Any, name: str, kind: type, *, where: str) -> Any:
    """`entry[name]` of the given type; raises DataError if it is missing or has another type."""
    if not isinstance(entry, dict) or name not in entry:
        raise DataError(f"{where} has no field {name!r}")
    value = entry[name]
    whole = isinstance(value, int) and is_int(value) and abs(value) <= _LARGEST_INT
    if not isinstance(value, kind) or (kind is int and not whole):
        raise DataError(f"{where}.{name} is {shown(value)!r}; expected a {kind.__name__}")
    return value
