"""Who works on what, without a coordinator: a claim is a file lock, which the kernel frees with its owner."""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from models.errors import CacheError


@contextmanager
def claim(path: Path, *, wait: bool) -> Iterator[bool]:
    """True if the claim is ours until the block ends: at once or after a wait; False if another has it."""
    descriptor = _locked(path, wait=wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(path: Path, *, wait: bool) -> int | None:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # a worker that finished has just removed the folder
        except OSError as error:
            raise CacheError(f"cannot write {path}: {error.strerror}; choose another `out`") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise CacheError(
                f"cannot lock {path}: {error.strerror}; the filesystem must support flock"
            ) from error
        if _still_named(descriptor, path):
            return descriptor
        os.close(descriptor)  # the file was removed while we waited: its lock says nothing


def _still_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def claimed(
    units: Sequence[int], *, folder: Path, kind: str, done: Callable[[int], bool]
) -> Iterator[tuple[int, ExitStack]]:
    """Units to work on, each with its claim, until every unit is done, by us or by others.

    Whoever takes one closes its stack when the unit is finished, in any thread; several may be held at once.
    First comes what is free, then what a dead owner left. Any number of workers may run this, join late or die.
    """
    for wait in (False, True):
        for unit in units:
            if done(unit):
                continue
            with ExitStack() as stack:
                ours = stack.enter_context(claim(folder / f"{kind}-{unit:06d}", wait=wait))
                if ours and not done(unit):
                    yield unit, stack.pop_all()


def share_out(
    units: Sequence[int], *, folder: Path, kind: str, done: Callable[[int], bool], work: Callable[[int], None]
) -> None:
    """Work on units one by one; return when every unit is done, by us or by others."""
    for unit, held in claimed(units, folder=folder, kind=kind, done=done):
        with held:
            work(unit)
