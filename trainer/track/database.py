"""MLflow's SQLite database as a file: its path, and how it is created completely or not at all.

MLflow makes its tables in a hundred steps. A second process that opens the file too early, or the first one after a
kill, can never complete them. So a temporary file gets the tables under a lock, and is then renamed.
"""

import os
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from flowmask.models.errors import ConfigError, UserError
from flowmask.models.files import TEMPORARY, sync
from flowmask.models.folders import locks

PATIENCE_S = 120.0  # waiting time for another process that makes the database
SETTLED_S = 20.0  # an incomplete database unwritten for this long has lost its maker
_SQLITE = re.compile(r"sqlite:///(?!:memory:|file:)(.+?)(\?\w+=[^?/]*)?", re.DOTALL)
_MLFLOWS = {"alembic_version", "experiments", "runs"}

_LASTING_CODES = {
    *("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "ENDPOINT_NOT_FOUND"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "NOT_IMPLEMENTED", "FEATURE_DISABLED"),
}
_LASTING_WORDS = re.compile(
    r"not a database|unable to open database file|readonly database|no such (?:table|column)|duplicate column|"
    r"table \S+ already exists|out-of-date database schema|authentication failed|database \S+ does not exist|"
    r"unknown database|access denied|invalid artifact path|certificate_verify_failed|wrong_version_number|"
    r"invalid url|no connection adapters|can't load plugin|no module named",
    re.IGNORECASE,
)


def file_of(uri: str) -> Path | None:
    """The file of an SQLite database, exactly as in the URI; None for any other server."""
    found = _SQLITE.fullmatch(uri)
    return Path(found[1]) if found else None


def absolute(uri: str) -> str:
    """A URI with the same meaning in every working folder; one with environment variables is not changed."""
    found = _SQLITE.fullmatch(uri)
    return uri if found is None or "${" in uri else f"sqlite:///{Path.cwd() / found[1]}{found[2] or ''}"


def entered(path: Path) -> str:
    """Change to the database's folder; returns the URI from there. A `?` in the folder's path would begin options."""
    if "?" in path.name:
        raise ConfigError(f"tracking.uri names the file {path.name}, which MLflow can't open; choose a name without ?")
    path.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(path.parent)
    return f"sqlite:///{path.name}"


def make_whole(path: Path, make: Callable[[Path], None], *, say: Callable[[str], None]) -> None:
    """Ensure a complete database at `path`: the existing one, or a new one by `make(file)`.

    An incomplete one is renamed, which is reported. TimeoutError if another process holds the lock.
    """
    if path.exists() and not is_half_made(path):
        return
    handle = locks.take(path.with_name(f".{path.name}.lock"), patience_s=PATIENCE_S)
    if handle is None:
        raise TimeoutError(f"another process has been making {path} for {PATIENCE_S:.0f} s")
    try:
        for left in path.parent.iterdir():
            if left.name.startswith(f"{TEMPORARY}{path.name}."):  # left by a killed maker: this process holds the lock
                left.unlink()
        while is_half_made(path) and time.time() - path.stat().st_mtime < SETTLED_S:
            time.sleep(0.5)  # a program that does not know the lock may be at work
        if is_half_made(path):
            say(f"{path} was left half made; it is now {_set_aside(path).name}, and a new database is made")
        if not path.exists():
            beside = path.with_name(f"{TEMPORARY}{path.name}.{os.urandom(8).hex()}")
            make(beside)
            beside.rename(path)
            sync(path.parent)
    finally:
        os.close(handle)


def is_half_made(path: Path) -> bool:
    """Whether MLflow's tables at `path` were begun but not finished: then its first experiment is missing.

    False for a complete database, for other files and for another program's database; MLflow itself checks those.
    """
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=20)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "experiments" in tables and database.execute("SELECT 1 FROM experiments LIMIT 1").fetchone():
                return False
    except sqlite3.Error:
        return False
    return not tables or bool(tables & _MLFLOWS)


def _set_aside(path: Path) -> Path:
    """Rename it to a free name, with its journals."""
    place = path.with_name(f"{path.name}.half-made-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}")
    for end in ("-journal", "-wal", "-shm", ""):
        if path.with_name(path.name + end).exists():
            path.with_name(path.name + end).rename(place.with_name(place.name + end))
    return place


def is_lasting(error: Exception) -> bool:
    """Whether waiting can't repair the cause of an error, so that a person must do something."""
    if isinstance(error, UserError | ImportError | PermissionError | NotADirectoryError | FileExistsError):
        return True
    return getattr(error, "error_code", None) in _LASTING_CODES or _LASTING_WORDS.search(str(error)) is not None
