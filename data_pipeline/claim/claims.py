"""Shares units among workers without a coordinator: a claim is a symbolic link to its owner's lease.

Making the link is atomic on every filesystem, so one worker wins. The claim of a dead or silent owner is not removed.
The next worker makes NAME~1 and then owns the unit, the one after it NAME~2; each name can be made only once.
An owner that was only slow continues and finishes. Two owners do no harm, because both produce the same bytes.
"""

import itertools
import os
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flowmask.data_pipeline.claim.leases import BEATS_PER_LEASE, Lease, Worker, read_lease, worker_in
from flowmask.models.errors import CacheError, TakenOverError
from flowmask.models.process import DEFAULT_LEASE_S

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
_VAIN, _NAMES_PER_QUESTION = 8, 256  # a listing costs about one question per 256 names
_WATCHED = 16  # claimed units that a waiting worker asks about
_random = random.SystemRandom()


@contextmanager
def claim(path: Path, *, wait: bool, lease_s: float = DEFAULT_LEASE_S) -> Iterator[bool]:
    """Yield True if this process holds the claim, at once or after a wait; False if another worker holds it."""
    with _held(path, wait=wait, lease_s=lease_s) as name:
        yield name is not None


@contextmanager
def _held(path: Path, *, wait: bool, lease_s: float) -> Iterator[Path | None]:
    """As `claim`, but yield the claim's name; it is not `path` if a dead or silent worker owned the unit before."""
    worker = worker_in(path.parent, lease_s=lease_s)
    name = _acquire(worker, path)
    pauses = _pauses(lease_s)
    while name is None and wait:
        time.sleep(next(pauses))
        name = _acquire(worker, path)
    try:
        yield name
    finally:
        if name is not None:
            _release(worker, name)


@dataclass(frozen=True)
class SharedUnits:
    """Units of one kind that any number of workers share, and the functions that ask about one unit.

    units:     in the order in which this worker wants them; workers that begin at different places seldom meet
    folder:    of the claims
    done:      whether a unit is finished; this answer decides
    listed:    finished units by one listing, which asks about all of them at the price of a few
    abandoned: called with a unit of a dead or silent owner before this worker gets it
    results:   folder of the finished units; opened before an important question, because a network filesystem
               may remember that a file was not there
    """

    units: Sequence[int]
    folder: Path
    kind: str
    done: Callable[[int], bool]
    listed: Callable[[], Collection[int]] = tuple
    abandoned: Callable[[int], None] = lambda _: None
    lease_s: float = DEFAULT_LEASE_S
    results: Path | None = None

    def claim_of(self, unit: int) -> Path:
        return self.folder / f"{self.kind}-{unit:06d}"

    def finished_and_in_hand(self) -> tuple[Collection[int], set[int]]:
        """Finished units, and claimed units whether their owners live or not; by two listings."""
        try:
            finished, heads = self.listed(), []
            with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
                heads = [entry.name.partition("~")[0].rpartition("-") for entry in entries]
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CacheError(f"cannot list {error.filename}: {error.strerror}; check the filesystem") from error
        return finished, {int(number) for kind, _, number in heads if kind == self.kind and number.isdecimal()}


def share_out(shared: SharedUnits, work: Callable[[int], None]) -> None:
    """Return when every unit is done, by any worker; units of dead or silent owners are taken over.

    Any number of workers may run this at once, join late or die.
    """
    taken_away = True
    while taken_away:
        taken_away = False
        for unit, held in claimed(shared):
            with held:
                taken_away |= not _worked(partial(work, unit))


def claimed(shared: SharedUnits) -> Iterator[tuple[int, ExitStack]]:
    """Yield units with their claims, for a worker that holds several units; ends when all other units are done.

    The caller closes the stack of a unit when the unit is finished, in any thread. A unit is given once: if another
    worker takes it over, call again. The filesystem's cost per unit does not grow with units and workers: two listings
    tell which units are unclaimed. They are repeated only after as many vain questions as two listings cost.
    """
    left, pauses = list(shared.units), _pauses(shared.lease_s)
    while True:
        finished, in_hand = shared.finished_and_in_hand()
        left = [unit for unit in left if unit not in finished]
        if not left:
            return
        free = [unit for unit in left if unit not in in_hand]
        most_vain = _VAIN + (len(finished) + len(in_hand)) // _NAMES_PER_QUESTION if free else _WATCHED
        settled, vain = set(), 0
        for unit in free or left[:_WATCHED]:
            held, ended = _begun(shared, unit)
            if held is not None:
                yield unit, held
            if held is not None or ended:
                settled.add(unit)
            vain += held is None
            if vain > most_vain:
                break
        if not settled:
            time.sleep(next(pauses))
            _look_again(shared.results)
            continue
        left, pauses = [unit for unit in left if unit not in settled], _pauses(shared.lease_s)
        if vain > most_vain:  # other workers are active here: continue elsewhere
            start = _random.randrange(len(left) + 1)
            left = left[start:] + left[:start]


def _begun(shared: SharedUnits, unit: int) -> tuple[ExitStack | None, bool]:
    """The unit's claim if this worker now holds it and the unit is not done; and whether the unit is done."""
    if shared.done(unit):
        return None, True
    path = shared.claim_of(unit)
    with ExitStack() as stack:
        name = stack.enter_context(_held(path, wait=False, lease_s=shared.lease_s))
        if name is None:
            return None, False
        _look_again(shared.results)
        if shared.done(unit):
            return None, True
        if name != path:
            shared.abandoned(unit)
        return stack.pop_all(), False


def once(
    path: Path,
    *,
    done: Callable[[], bool],
    work: Callable[[], object],
    lease_s: float = DEFAULT_LEASE_S,
    results: Path | None = None,
) -> None:
    """Return when `done`, after the `work` of any one worker; a worker that dies during it is replaced."""
    pauses = _pauses(lease_s)
    while not done():
        with claim(path, wait=False, lease_s=lease_s) as ours:
            if ours:
                _look_again(results)
            if ours and (done() or _worked(work)):
                return
        time.sleep(next(pauses))
        _look_again(results)


def _worked(work: Callable[[], object]) -> bool:
    """False if another worker took over the unit during the work."""
    try:
        work()
    except TakenOverError:
        return False
    return True


@dataclass(frozen=True)
class Claim:
    """A unit claimed by a worker, alive or dead."""

    name: str
    lease: Lease | None  # None: the owner has left or cleaned up
    since_ns: int  # filesystem's time at which it was claimed


def claims_in(folder: Path) -> list[Claim]:
    """The latest claim of each name in a folder; empty if the folder does not exist."""
    latest: dict[str, tuple[int, Path]] = {}
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            name, _, number = path.name.partition("~")
            generation = int(number) if number.isdecimal() else 0
            if path.is_symlink() and generation >= latest.get(name, (0, path))[0]:
                latest[name] = generation, path
    found = []
    for name, (_, path) in sorted(latest.items()):
        with suppress(FileNotFoundError):  # released in the meantime
            since_ns = path.lstat().st_mtime_ns
            found.append(Claim(name, read_lease(path), since_ns))
    return found


def _acquire(worker: Worker, path: Path) -> Path | None:
    """The name under which this worker holds `path`; None if the owner may be alive."""
    for generation in itertools.count():
        name = path.with_name(f"{path.name}~{generation}") if generation else path
        now_ns = worker.beat()
        if _make(worker, name):
            return name
        if not _is_free(worker, name, now_ns):
            return None
    raise AssertionError


def _make(worker: Worker, name: Path) -> bool:
    """Create a claim; False if it exists. An own unused claim, left by a release or a lost reply, is used again."""
    with worker.lock:
        while True:
            try:
                name.symlink_to(worker.path.name)
            except FileExistsError:
                if name in worker.held or _target(name) != worker.path.name:
                    return False
            except FileNotFoundError:
                worker.beat()  # a worker that finished has just removed the folder; beat() makes it again
                continue
            except OSError as error:
                raise CacheError(
                    f"cannot write {name}: {error.strerror}; `out` needs free space and symbolic links"
                ) from error
            worker.held.add(name)
            worker.watched.pop(name, None)
            return True


def _release(worker: Worker, name: Path) -> None:
    with worker.lock:
        worker.held.discard(name)
        with suppress(OSError):  # the folder is gone, or an own unused claim stays: see _make
            if _target(name) == worker.path.name:
                name.unlink()


def _target(name: Path) -> str | None:
    try:
        return name.readlink().name
    except OSError:
        return None


def _is_free(worker: Worker, name: Path, now_ns: int) -> bool:
    """Whether the owner of a claim is dead, or silent for so long that its unit may be taken over.

    Either the filesystem's clock says the lease is over *and* this worker saw two beats missing, or this worker saw
    no beat for a whole lease. So a filesystem that stamps files with a client's wrong clock does no harm.
    """
    lease = read_lease(name)
    if lease is None:
        return name.is_symlink()  # owner cleaned up; no link: released just now, ask again
    state = lease.state(now_ns)
    if state == "dead":
        return True
    sign = (_target(name), lease.beat_ns)
    seen, first_s = worker.watched.get(name, (None, 0.0))
    if seen != sign:
        worker.watched[name] = sign, (first_s := time.monotonic())
    watched_s = time.monotonic() - first_s
    return watched_s > (2 / BEATS_PER_LEASE if state == "expired" else 1) * lease.lease_s


def _pauses(lease_s: float) -> Iterator[float]:
    """Seconds between two looks: they grow, so waiting costs little; random, so workers do not ask together."""
    pause_s = _FIRST_PAUSE_S
    while True:
        yield pause_s * _random.uniform(0.75, 1.25)
        pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S, lease_s / 6)


def _look_again(folder: Path | None) -> None:
    """Open the folder, so that a network filesystem asks its server for the current content."""
    for place in (folder.parent, folder) if folder else ():
        with suppress(OSError):
            os.close(os.open(place, os.O_RDONLY | os.O_DIRECTORY))
