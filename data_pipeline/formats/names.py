"""Names of a dataset: their time order, and file names made from them.

A name that every file system can store is not changed. In other names, unsafe bytes are written as %hh, which
`urllib.parse.unquote` decodes; a name of more than 200 bytes ends in its hash.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable

LONGEST_ID = 1000  # characters
_LONGEST_BYTES = 200  # file systems allow 255; temporary names and suffixes are added
_CUT = "%~"
# Characters that some system reserves, this file's escape character, and ends that some system drops or hides.
_UNSAFE = re.compile(r'[\0-\x1f\x7f/\\:*?"<>|]|%[0-9a-fA-F]{2}|%~|\A[. ]|[. ]\Z')
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9\xb9\xb2\xb3])\s*(\.|\Z)", re.IGNORECASE)
_KEPT = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-.")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts 2 before 10: a run of digits counts as its number."""
    pieces = (piece for piece in re.split("([0-9]+)", name) if piece)
    numbers = ((piece.lstrip("0"), piece) for piece in pieces)
    return [(0, len(number), number) if piece[0] in "0123456789" else (1, 0, piece) for number, piece in numbers]


def in_time_order(names: Iterable[str]) -> list[str]:
    """Names sorted by their numbers; 1 before 01."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def same_file(name: str) -> str:
    """A key that is equal for names that some file system treats as the same, by case or by the form of accents."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFD", name).casefold())


def file_names(ids: Iterable[str], *, spelled: Callable[[str], str] = str) -> dict[str, str]:
    """A file name for each of several distinct ids; all file systems can tell the names apart.

    spelled: the preferred name of an id, used if it is safe and unique
    """
    plain = {name: spelled(name) for name in ids}
    owners = Counter(map(same_file, plain.values()))
    return {
        name: short if _is_safe(short) and owners[same_file(short)] == 1 else _escaped(name)
        for name, short in plain.items()
    }


def _is_safe(name: str) -> bool:
    return not (_UNSAFE.search(name) or _DEVICES.match(name)) and len(name.encode()) <= _LONGEST_BYTES


def _escaped(name: str) -> str:
    raw = name.encode()
    coded = [chr(byte) if byte in _KEPT else f"%{byte:02x}" for byte in raw]
    if coded[0] == "." or coded[-1] == "." or _DEVICES.match("".join(coded)):
        coded[0], coded[-1] = f"%{raw[0]:02x}", f"%{raw[-1]:02x}"
    escaped = "".join(coded)
    if len(escaped) <= _LONGEST_BYTES:
        return escaped
    return f"{escaped[:120]}{_CUT}{hashlib.sha256(raw).hexdigest()[:40]}"
