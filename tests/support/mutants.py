"""Damaged forms of a file: changed bytes, changed structure and changed values."""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

from flowmask.models.stored.sealed import seal, seal_readable

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**32 - 1, 2**63, -(2**63), 10**30, 1e308, 1e-320, -0.0),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "../../etc/passwd",
        "000000.tar; touch x",
        "x" * 5000,
        "\ud800",
        "\x1b[2J",
        "\0",
    ),
    *([], {}, [[]], [0], {"": None}, [1, "a", None], {"file": "/dev/zero"}),
)


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change one or a few bytes at any place."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.7 else min(len(data), rng.randrange(200))
        length = rng.choice((1, 1, 2, 8, 64, 512))
        how = rng.randrange(8)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at : at + length] = rng.randbytes(length)
        elif how == 2:
            del data[at : at + length]
        elif how == 3:
            data[at:at] = data[at : at + length]
        elif how == 4:
            del data[at:]
        elif how == 5:
            data += rng.randbytes(length)
        elif how == 6:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)))
        else:
            data[at : at + 1] = rng.choice((b"9" * 400, b"[" * 3000, b'"', b"\\u0000", b"e999", b"\xff\xfe", b"\n"))
    return bytes(data)


def change_value(value: Any, rng: random.Random) -> Any:
    """Change one place of a nested value: removed, renamed, doubled, exchanged, or replaced by an odd value."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        item = stack.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        places += [(item, key) for key in keys]
        stack += [item[key] for key in keys]
    if not places:
        return rng.choice(ODD)
    home, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del home[key]
    elif how == 1 and isinstance(home, dict):
        home[key + rng.choice(("x", " ", "\u0000"))] = home.pop(key)
    elif how == 2 and isinstance(home, list):
        home.insert(rng.randrange(len(home) + 1), copy.deepcopy(home[key]))
    elif how == 3 and type(home[key]) in (int, float):
        home[key] = rng.choice((home[key] + 1, -home[key], home[key] * 2**20, home[key] + 0.5, str(home[key])))
    elif how == 4:
        other, name = rng.choice(places)
        home[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(home[key])
    else:
        home[key] = rng.choice(ODD) if rng.random() < 0.9 else deep(rng.choice((50, 300)))
    return value


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Change one place in a file's JSON; its seal stays the same."""
    return json.dumps(change_value(json.loads(content), rng), indent=1).encode()


def resealed(content: bytes, rng: random.Random) -> bytes:
    """`change_json` with a valid seal: a file that a stranger can make."""
    value = json.loads(content)
    value.pop("seal")
    changed = change_value(value, rng)
    try:
        return (seal_readable if content.startswith(b"{\n") else seal)(changed if isinstance(changed, dict) else {})
    except (ValueError, RecursionError):
        return change_bytes(content, rng)


def change_lines(content: bytes, rng: random.Random) -> bytes:
    """Change, double, remove or move one line of JSON lines; empty lines are left out."""
    lines = [line for line in content.splitlines(keepends=True) if line.strip()]
    at, how = rng.randrange(len(lines)), rng.randrange(4)
    if how == 0:
        lines[at] = json.dumps(change_value(json.loads(lines[at]), rng)).encode() + b"\n"
    elif how == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif how == 2:
        del lines[at]
    else:
        rng.shuffle(lines)
    return b"".join(lines)


Change = Callable[[bytes, random.Random], bytes]
