"""The files of an evaluation: its working files, and their publication as results.

    out/.evaluate/<fingerprint>/{masks/<video>/<expression>/<frame>.png, records/<video>.json}   at work
    out/.evaluate/<fingerprint>/{calibration/<video>.json, presence.json}                       of --calibrate
    out/.evaluate/<fingerprint>/labels/<video>/<annotator>/<frame>.png                          of some protocols
    out/{masks/, labels/, report.html, overlays/, submission.zip, config.yaml, scores.json}              published

Names are those of `MaskNames`. A record is written after its video's masks, and trusted only in the folder of the same
weights, data and settings. scores.json comes last. Older results and the working files stay until all new results are
complete, so the next start does not compute them again.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmask.models.errors import ConfigError
from flowmask.models.files import read_object, remove_known, write_atomically
from flowmask.models.folders import locks
from flowmask.models.folders.output_folder import Kind, OutputFolder
from flowmask.models.stored.sealed import parse_json
from flowmask.models.stored.typed import read_yaml
from flowmask.trainer.score.archive import FILE as ARCHIVE
from flowmask.trainer.score.report.overlays import OVERLAYS
from flowmask.trainer.state.owner import note_start

MASKS, REPORT, CONFIG, SCORES = "masks", "report.html", "config.yaml", "scores.json"
LABELS = "labels"
RESULTS = (SCORES, REPORT, OVERLAYS, ARCHIVE, CONFIG, LABELS, MASKS)
_WORK = ".evaluate"
_PUBLISH_S = 24 * 3600.0  # a day: publishing draws videos and hashes every mask


class EvaluationStore:
    """The files of one evaluation, shared by every process that works on it."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        """Make the folders; raises ConfigError if `out` is not writable or has other contents."""
        self.out, self._home = out, out / _WORK
        self._work = self._home / fingerprint
        self._folder = OutputFolder(out, EVALUATION)
        with self._folder.held():  # undoes the partial work of a killed publisher
            self._folder.refuse_strangers(RESULTS)
            self._make(self._home)

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"out is {self.out}; it is not writable ({error.strerror}): choose another out"
            ) from error

    @contextmanager
    def claim(self, rank: int) -> Iterator[None]:
        """Lock `rank` for this process; the kernel releases the lock when the process ends."""
        lock = locks.take(self._home / f"rank_{rank}.lock")
        if lock is None:
            raise ConfigError(f"out is {self.out}; another evaluation is writing there: choose another out")
        try:
            if rank == 0:
                self._drop_other_work()
                note_start(self.out)
            self._make(self._work / MASKS)
            self._make(self._work / "records")
            yield
        finally:
            os.close(lock)

    def start_video(self, video: str) -> None:
        """Delete the masks of a video that was not finished."""
        for kind in (MASKS, LABELS):
            remove_known(self._work / kind / video, _is_work)

    def labels(self, video: str) -> Path:
        """The folder for a video's label maps, if there are any; not made here."""
        return self._work / LABELS / video

    def mask_folder(self, key: str) -> Path:
        """The folder for the masks of one expression, `<video>/<expression>`, during the evaluation."""
        folder = self._work / MASKS / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write_record(self, video: str, record: Mapping[str, Any]) -> None:
        """Record that a video is done, with its numbers."""
        write_atomically(self._record(video), json.dumps(record, allow_nan=False))

    def record(self, video: str) -> dict[str, Any] | None:
        """The record of a video, or None if the video is not done."""
        if not (self._work / MASKS / video).is_dir():
            return None
        try:
            return parse_json(self._record(video).read_text())
        except (OSError, ValueError):
            return None

    def note_judged(self, video: str, judged: Sequence[Any]) -> None:
        """Store the calibration result of a video; all writers have the same result."""
        self._make(self._work / "calibration")
        write_atomically(self._judged(video), json.dumps({"judged": judged}, allow_nan=False))

    def judged(self, video: str) -> list[Any] | None:
        """The calibration result of a video, or None if the video is not done."""
        found = read_object(self._judged(video)).get("judged")
        return found if isinstance(found, list) else None

    def chosen_once(self, choose: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The choice of the first process that calls this; all others get the same."""
        file = self._work / "presence.json"
        with self._publisher():
            if not (found := read_object(file)):
                found = dict(choose())
                write_atomically(file, json.dumps(found, allow_nan=False))
            return found

    def publish_if_complete(
        self, videos: Sequence[str], build: Callable[[Path, Path, list[dict[str, Any]]], Mapping[str, Any]]
    ) -> bool:
        """Once every video has its record, replace the results in `out`. The last process does this, exactly once.

        build: (folder of the masks, empty folder for the other results, records in the order of `videos`) -> the
               content of scores.json
        returns: whether it published; False if videos are missing or another process has published
        """
        with self._publisher():
            records = [self.record(video) for video in videos]
            known = [record for record in records if record is not None]
            if len(known) < len(records):
                return False
            with self._folder.scratch() as place:
                results = dict(build(self._work / MASKS, place, known))
                (place / SCORES).write_text(json.dumps(results, indent=1, allow_nan=False))
                moves = {name: place / name for name in RESULTS if (place / name).exists()}
                moves |= {kind: self._work / kind for kind in (MASKS, LABELS) if (self._work / kind).exists()}
                with self._folder.held():
                    self._folder.swap(place, moves, index=SCORES, gone=RESULTS)
            remove_known(self._work, _is_work)
            return True

    @contextmanager
    def _publisher(self) -> Iterator[None]:
        lock = locks.take(self._home / "publish.lock", patience_s=_PUBLISH_S)
        if lock is None:
            raise ConfigError(f"out is {self.out}; another process has been publishing there for a day: stop it")
        try:
            yield
        finally:
            os.close(lock)

    def _judged(self, video: str) -> Path:
        return self._work / "calibration" / f"{video}.json"

    def _record(self, video: str) -> Path:
        return self._work / "records" / f"{video}.json"

    def _drop_other_work(self) -> None:
        for entry in self._home.iterdir():
            if entry.is_dir() and not entry.is_symlink() and entry != self._work:
                remove_known(entry, _is_work)


def _is_work(relative: str) -> bool:
    """Whether FlowMask makes this file below `.evaluate/<fingerprint>`, or below its masks or labels."""
    of_masks = r"((masks|labels)/)?([^/]+/){0,2}[^/]+\.png"
    return bool(re.fullmatch(rf"{of_masks}|((records|calibration)/)?([^/]+\.json|\.tmp-[^/]+)", relative))


def _older(out: Path) -> list[str] | None:
    """The files of an evaluation of an earlier version: published, or begun."""
    config, report = out / CONFIG, out / REPORT
    if not (out / SCORES).exists():
        names = {entry.name for entry in out.iterdir() if not entry.name.startswith(".")}
        begun = any(re.fullmatch(r"[0-9a-f]{16}", path.parent.name) for path in (out / _WORK).glob("*/records"))
        return [] if begun and not {n for n in names if not n.startswith(("launch", "slurm"))} else None
    if not {"videos", "expressions", "per_expression", "weights"} <= read_object(out / SCORES).keys():
        return None
    if config.exists() and not _is_config(config):
        return None
    if report.exists() and b"<title>FlowMask evaluation</title>" not in report.read_bytes()[:300]:
        return None
    single = [name for name in (SCORES, REPORT, ARCHIVE, CONFIG) if (out / name).is_file()]
    many = [*out.glob(f"{MASKS}/*/*/*.png"), *out.glob(f"{OVERLAYS}/*.mp4")]
    return [*single, *(path.relative_to(out).as_posix() for path in many)]


def _is_config(path: Path) -> bool:
    try:
        found = read_yaml(path)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and isinstance(found.get("checkpoint"), str)


EVALUATION = Kind("an evaluation", older=_older, dots=(_WORK, ".owner.json", ".ended.json"))
