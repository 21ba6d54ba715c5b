"""A user's mark on files that this user's processes wrote: nobody else can make it, whatever a folder contains.

The key is outside of all run folders, in $XDG_STATE_HOME/flowmask/key (~/.local/state), mode 0600. If it can't be
stored (no home, a full disk), no file gets a mark, and files without a mark belong to no user.
"""

import hashlib
import hmac
import os
from contextlib import suppress
from pathlib import Path

_BYTES = 32


def signature(*words: str) -> str:
    """This user's mark on the words; the key is made at the first use. Empty if the key can't be stored."""
    key = _key() or _new_key()
    return _mark(key, words) if key else ""


def is_ours(mark: object, *words: str) -> bool:
    """Whether this user marked the words. Writes nothing."""
    key = _key()
    return bool(key) and isinstance(mark, str) and hmac.compare_digest(mark.encode(), _mark(key, words).encode())


def _mark(key: bytes, words: tuple[str, ...]) -> str:
    return hmac.new(key, repr(words).encode(errors="surrogatepass"), hashlib.sha256).hexdigest()


def _place() -> Path | None:
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        return (Path(state) if state.startswith("/") else Path.home() / ".local" / "state") / "flowmask" / "key"
    except RuntimeError:  # a user without a home
        return None


def _key() -> bytes:
    place = _place()
    try:
        found = place.read_bytes() if place is not None else b""
    except OSError:
        return b""
    return found if len(found) == _BYTES else b""


def _new_key() -> bytes:
    place = _place()
    if place is None:
        return b""
    with suppress(OSError):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = place.with_name(f".tmp-key.{os.urandom(8).hex()}")
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(os.urandom(_BYTES))
            with suppress(FileExistsError):  # another process was first
                os.link(beside, place)
        finally:
            beside.unlink(missing_ok=True)
    return _key()
