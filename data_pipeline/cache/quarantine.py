"""Inputs that cannot be read: each is one line of quarantine.jsonl, and the build continues without it.

{"video", "clip" (null: the whole video), "file", "reason"}, paths relative to data.root. A clip's line is in
its unit's sidecar, and in work/quarantine/ during the build; plan/ has those of whole videos; a finished
cache has all of them in the order of the plan.
Only inputs are quarantined: a full disk, too little memory or a dataset that vanished are errors.
"""

import errno
from collections.abc import Iterable, Sequence
from pathlib import Path

from flowmask.data_pipeline.cache.shards import sidecar_name, write_file
from flowmask.models.errors import CacheError, DataError
from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import to_json
from flowmask.models.stored.typed import parse_as

FILE = "quarantine.jsonl"
LIVE = "quarantine"  # folder below work/
Line = dict[str, str | None]
_MOST_BYTES = 1 << 28
_OURS = frozenset((errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ETIMEDOUT))


def line(error: DataError, *, video_id: str, clip: str | None, roots: Sequence[Path]) -> Line:
    """The line of an unreadable input; `error` is "FILE: REASON". Raises errors that are not caused by the input."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _OURS:
            raise error
        cause = cause.__cause__ or cause.__context__
    if gone := next((root for root in roots if not root.exists()), None):
        raise DataError(f"{gone}: the dataset has vanished while the cache was built; build again") from error
    message = str(error)
    for root in roots:
        message = message.replace(f"{root}/", "").replace(str(root), root.name)
    file, _, reason = message.partition(": ")
    return {"video": video_id, "clip": clip, "file": file, "reason": " ".join(reason.split())}


def to_bytes(lines: Iterable[Line]) -> bytes:
    return b"".join(to_json(entry) + b"\n" for entry in lines)


def read(path: Path) -> list[Line]:
    """Lines of a quarantine file; none if there is no such file."""
    try:
        return [parse_as(text, Line) for text in read_regular(path, limit=_MOST_BYTES).splitlines()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CacheError(f"{path} is damaged ({error}); delete it and build again") from error


def summary(cache: Path) -> str:
    """What a finished cache lacks, in one line that names the first; empty if it lacks nothing."""
    if not (lines := read(cache / FILE)):
        return ""
    videos = sum(one["clip"] is None for one in lines)
    counts = ((videos, "video"), (len(lines) - videos, "clip"))
    lost = " and ".join(f"{count:,} {thing}{'s' * (count != 1)}" for count, thing in counts if count)
    first = f"{lines[0]['file']}: {lines[0]['reason']} (video {lines[0]['video']})"
    return f"{lost} cannot be read and {'is' if len(lines) == 1 else 'are'} left out; the first: {first}"


class Quarantine:
    """The quarantined inputs of all workers of a build so far, and the limit."""

    def __init__(self, out: Path, *, clips: int, videos: int, fraction: float, shards: Path):
        """clips: planned ones; videos: those of videos whose clips nobody knows: at least one in each view."""
        self._folder, self._shards = out / "work" / LIVE, shards
        self._clips, self._videos, self._fraction = clips + videos, videos, fraction
        self._counts: dict[Path, int] = {}  # lines of finished units, each read once

    def begin(self, unit: int) -> None:
        """Delete the lines of an earlier attempt at a unit."""
        self._path(unit).unlink(missing_ok=True)

    def add(self, unit: int, lines: Sequence[Line]) -> None:
        """Write the lost clips of a unit so far. Raises DataError if the build has lost too many."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_file(self._path(unit), to_bytes(lines))
        others = (path for path in self._folder.glob("*.jsonl") if path != self._path(unit))
        known = self._counts
        self._counts = {
            path: known[path] if path in known else len(read(path))
            for path in others
            if path in known or self._sidecar(path).exists()
        }
        if self._are_too_many(len(lines) + sum(self._counts.values())):
            self._check(lines, finished=[path for path in self._finished() if path != self._path(unit)])

    def check(self) -> None:
        """Raises DataError if all workers together have lost too many clips."""
        self._check((), finished=self._finished())

    def _are_too_many(self, clips: int) -> bool:
        return clips + self._videos > self._fraction * self._clips

    def _check(self, lines: Sequence[Line], *, finished: list[Path]) -> None:
        found = [*lines, *(line for path in finished for line in read(path))]
        if not self._are_too_many(len(found)):
            return
        for path in finished:  # the next build tries them again, when their inputs may be repaired
            self._sidecar(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise too_many(
            len(found) + self._videos, of=self._clips, fraction=self._fraction, example=found[0] if found else None
        )

    def _finished(self) -> list[Path]:
        """Files of finished units; a unit of another worker counts when it is finished."""
        return [path for path in sorted(self._folder.glob("*.jsonl")) if self._sidecar(path).exists()]

    def _path(self, unit: int) -> Path:
        return self._folder / f"{unit:06d}.jsonl"

    def _sidecar(self, path: Path) -> Path:
        return self._shards / sidecar_name(int(path.stem))


def too_many(lost: int, *, of: int, fraction: float, example: Line | None) -> DataError:
    counted = (
        f"{lost} of {of} clips cannot be read, more than cache.max_quarantined_fraction {fraction:g}; repair "
        "the inputs, or raise the limit"
    )
    if example is None:
        return DataError(counted)
    return DataError(f"{example['file']}: {example['reason']} (video {example['video']}): {counted}")
