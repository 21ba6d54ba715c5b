"""Where an evaluation keeps its masks and scores while it works, and how they become its results.

    out/.evaluate/<fingerprint>/{masks/<video>/<expression>/<frame>.png, records/<video>.json}   at work
    out/{masks/, report.html, overlays/, submission.zip, scores.json}                           published

A record is written after its video's masks, and trusted only in the folder of the same weights, data and
settings: masks of another checkpoint are neither scored nor left among the new ones. scores.json comes last.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmask.models.errors import ConfigError, DataError
from flowmask.models.files import write_atomically
from flowmask.models.stored.sealed import parse_json
from flowmask.trainer.state import locks
from flowmask.trainer.state.owner import note_start

MASKS, REPORT, SCORES = "masks", "report.html", "scores.json"


class EvaluationStore:
    """The files of one evaluation, shared by every process that works on it."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        """Make the folders; ConfigError if `out` cannot be written."""
        self.out, self._home = out, out / ".evaluate"
        self._work = self._home / fingerprint
        try:
            (self._work / "records").mkdir(parents=True, exist_ok=True)
            (self._work / MASKS).mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out is {out}; it can't be written ({error.strerror}): choose another") from error

    @contextmanager
    def claim(self, rank: int) -> Iterator[None]:
        """Be the one process that works as `rank` here; the kernel lets go when the process ends."""
        lock = locks.take(self._home / f"rank_{rank}.lock")
        if lock is None:
            raise ConfigError(f"out is {self.out}; another evaluation is writing there: choose another")
        try:
            if rank == 0:
                self._drop_other_work()
                note_start(self.out)
            yield
        finally:
            os.close(lock)

    def start_video(self, video_id: str) -> None:
        """Forget masks of a video that was not finished."""
        shutil.rmtree(self._work / MASKS / video_id, ignore_errors=True)

    def mask_folder(self, video_id: str, exp_id: str) -> Path:
        """Where the masks of one expression go while the evaluation is at work."""
        folder = self._work / MASKS / safe_name(video_id) / safe_name(exp_id)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write_record(self, video_id: str, record: Mapping[str, Any]) -> None:
        """Say that a video is done, with its numbers."""
        write_atomically(self._record(video_id), json.dumps(record, allow_nan=False))

    def record(self, video_id: str) -> dict[str, Any] | None:
        """What `write_record` was given, or None when the video has still to be done."""
        if not (self._work / MASKS / video_id).is_dir():
            return None
        try:
            return parse_json(self._record(video_id).read_text())
        except (OSError, ValueError):
            return None

    def publish_if_complete(
        self, video_ids: Sequence[str], finish: Callable[[Path, list[dict[str, Any]]], Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """Once every video has its record, replace the results in `out`; whoever comes last does it, once.

        finish: (folder of the masks, records in the order of `video_ids`) -> what scores.json shall hold
        returns: that, or None while videos are missing or when another process has published
        """
        with (self._home / "publish.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = [self.record(video_id) for video_id in video_ids]
            if any(record is None for record in records):
                return None
            for name in (SCORES, REPORT):
                (self.out / name).unlink(missing_ok=True)
            old = self._home / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            if (self.out / MASKS).exists():
                (self.out / MASKS).rename(old)
            (self._work / MASKS).rename(self.out / MASKS)
            results = dict(finish(self.out / MASKS, [record for record in records if record is not None]))
            write_atomically(self.out / SCORES, json.dumps(results, indent=1, allow_nan=False))
            shutil.rmtree(self._work, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            return results

    def _record(self, video_id: str) -> Path:
        return self._work / "records" / f"{safe_name(video_id)}.json"

    def _drop_other_work(self) -> None:
        for entry in self._home.iterdir():
            if entry.is_dir() and entry != self._work:
                shutil.rmtree(entry, ignore_errors=True)


def safe_name(name: str) -> str:
    """A dataset's id as one path component; DataError if it would lead out of the folder."""
    if not name or name in (".", "..") or os.sep in name or "\0" in name:
        raise DataError(f"id {name!r} cannot name a folder; rename it in the dataset")
    return name
