"""`flowmask cache repair`: makes the files that verify calls wrong again, and no other file.

A shard is encoded again in a separate folder and moved into place. A sidecar is made from its shard; index,
quarantine and manifest from the sidecars; the plan from the dataset. After a kill the same command continues. Refuses
a changed dataset, changed weights or settings, and an input that has become unreadable.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from flowmask.data_pipeline.build import finalise, sentences
from flowmask.data_pipeline.build.build import Build
from flowmask.data_pipeline.build.records import Sidecar, parse_sidecar
from flowmask.data_pipeline.cache import manifest, quarantine
from flowmask.data_pipeline.cache.manifest import read_manifest
from flowmask.data_pipeline.cache.quarantine import Quarantine
from flowmask.data_pipeline.cache.shards import FOLDER, remove_leftovers, shard_name, sidecar_name, write_file
from flowmask.data_pipeline.check.verify_report import Problem, VerifyReport
from flowmask.data_pipeline.check.verify_shard import (
    Storage,
    WrongError,
    facts_of,
    file_hash,
    parsed,
    read_shard,
    readable_manifest,
)
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.plan import units
from flowmask.data_pipeline.plan.fingerprint import fingerprint, refuse_other
from flowmask.data_pipeline.show.inspect_cache import OnProgress
from flowmask.models.errors import CacheError, ConfigError, UserError

_STAGE = "repair"
_FOLLOWING = (quarantine.FILE, finalise.index.FILE, manifest.FILE)
_ADVICE = "only what it was made of can repair it: give that as KEY=VALUE, or build a new cache"


@dataclass
class RepairReport:
    """Files that were made again, each with the method; `notes` name the files whose bytes are not the earlier ones."""

    mended: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def repair(
    folder: Path,
    *,
    found: Callable[[], VerifyReport],
    config: Callable[[], CacheBuildConfig],
    rebuild: Sequence[int] = (),
    on_progress: OnProgress = lambda *_: None,
) -> RepairReport:
    """Repair a finished cache. CacheError if it is none, cannot be repaired here, or another process repairs it.

    found:   verifies the cache; not called if `rebuild` names the units to encode again
    config:  of the build; called only if something must be encoded, so other repairs need no dataset
    """
    with _alone(folder):
        problems = [Problem(folder / FOLDER / shard_name(u), "", u) for u in rebuild] or found().problems
        try:
            if not problems:
                return RepairReport()
            return _Repair(folder, config=config, on_progress=on_progress).run(problems)
        finally:
            _remove(folder / "work" / _STAGE)  # of this repair, or of a killed one
            for place in (folder, folder / FOLDER, folder / units.FOLDER):
                remove_leftovers(place)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Allow one repair of a cache at a time; the lock leaves no file behind."""
    if not folder.is_dir():
        read_manifest(folder)  # raises the advice if there is no manifest
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CacheError(f"{folder} is being repaired by another process; wait for it") from None
    except OSError:
        pass  # a filesystem without locks: two repairs only waste time
    try:
        yield
    finally:
        os.close(descriptor)


def _remove(stage: Path) -> None:
    if not stage.exists():
        return
    shutil.rmtree(stage, ignore_errors=True)
    with suppress(OSError):
        stage.parent.rmdir()  # only if it is empty


class _Repair:
    """One repair; files that other files are computed from come first."""

    def __init__(self, folder: Path, *, config: Callable[[], CacheBuildConfig], on_progress: OnProgress):
        self.folder, self.shards, self.on_progress = folder, folder / FOLDER, on_progress
        self.stage = folder / "work" / _STAGE
        self._config = config
        self.report = RepairReport()
        self.manifest = readable_manifest(folder)
        self._entries = {entry.file: entry for entry in self.manifest.shards} if self.manifest else {}

    def run(self, problems: Sequence[Problem]) -> RepairReport:
        _remove(self.stage)  # of a killed repair
        wrong = {problem.file for problem in problems}
        if any(file.parent == self.folder / units.FOLDER for file in wrong):
            self._plan_again()
        plan = units.read_plan(self.folder / units.FOLDER)
        if plan is None:
            raise CacheError(f"{self.folder / units.FOLDER} holds no plan; run `flowmask cache repair` again")
        self._plan = plan
        shards = {p.unit for p in problems if p.unit is not None and p.file.suffix == ".tar"}
        sidecars = {p.unit for p in problems if p.unit is not None} - shards
        last = self._plan.clip_units - 1
        if beyond := [unit for unit in shards if unit > last]:
            raise ConfigError(f"{self.folder} has no unit {beyond[0]}; its last is {last}")
        refused = {unit for unit in sorted(sidecars) if not self._sidecar_again(unit)}
        if again := sorted(shards | (refused if self._adds_up() else sidecars)):
            self._units_again(again)
        before = {name: _hash(self.folder / name) for name in _FOLLOWING}
        finalise.finalise(self.folder, self._plan)
        for name in _FOLLOWING:
            if _hash(self.folder / name) != before[name]:
                self._mended(self.folder / name, "made again from the sidecars")
        return self.report

    def _mended(self, file: Path, how: str) -> None:
        self.report.mended.append((file, how))

    @cached_property
    def _build(self) -> Build:
        """The encoders and the dataset of the build; UserError if they have changed or are missing."""
        config = self._config().model_copy(update={"out": self.folder})
        try:
            build = Build(config)
            self.stage.mkdir(parents=True, exist_ok=True)
            ours = fingerprint(config, build.source, memo=self.stage / "weights.json")
        except UserError as error:
            raise type(error)(f"cannot repair {self.folder} without its dataset and its encoders: {error}") from error
        theirs, _ = facts_of(self.folder, self.manifest)
        refuse_other(ours, theirs, where=self.folder, advice=_ADVICE)
        self._ours = ours
        return build

    def _plan_again(self) -> None:
        """Write the plan in a separate folder and move its files, plan.json last."""
        stage = self.stage / units.FOLDER
        self._build.plan_into(stage, fingerprint=self._ours)
        target = self.folder / units.FOLDER
        target.mkdir(exist_ok=True)
        for name in (*units.FILES, "plan.json"):
            if _hash(stage / name) != _hash(target / name):
                (stage / name).replace(target / name)
                self._mended(target / name, "planned again from the dataset")

    def _sidecar_again(self, unit: int) -> bool:
        """Make a sidecar from its shard; False if shard, manifest and plan do not hold all of its content."""
        path = self.shards / shard_name(unit)
        entry = self._entries.get(path.name)
        if self.manifest is None or entry is None:
            return False
        try:
            size, sha256 = file_hash(path)
            storage = Storage.of(self._plan.fingerprint, self._plan.facts)
            rows = read_shard(path, unit=unit, storage=storage)
        except WrongError:
            return False
        if sha256 != entry.sha256:
            return False
        planned = {clip.key: len(clip.masks) for clip, _ in self._plan.unit_clips(unit)}
        lost = [line for line in quarantine.read(self.folder / quarantine.FILE) if line["clip"] in planned]
        kept = sum(planned.values()) - sum(planned[str(line["clip"])] for line in lost)
        sidecar = rows.sidecar(
            unit=unit,
            size=size,
            sha256=sha256,
            dropped_empty_masks=kept - rows.masks,
            quarantined=lost,
            made_with=self.manifest.environments[entry.made_with],
        )
        write_file(self.shards / sidecar_name(unit), sidecar.to_bytes())
        self._mended(self.shards / sidecar_name(unit), "made again from its shard")
        return True

    def _adds_up(self) -> bool:
        """Whether all sidecars together drop and quarantine as the manifest says; True if a sidecar is missing."""
        if self.manifest is None:
            return True
        dropped = lost = 0
        for unit in range(self._plan.clip_units):
            sidecar = self._sidecar(unit)
            if sidecar is None:
                return True
            dropped, lost = dropped + sidecar.dropped_empty_masks, lost + len(sidecar.quarantined)
        return (dropped, lost) == (self.manifest.dropped_empty_masks, self.manifest.quarantined_clips)

    def _sidecar(self, unit: int) -> Sidecar | None:
        try:
            return parsed(self.shards / sidecar_name(unit), parse_sidecar)
        except WrongError:
            return None

    def _units_again(self, again: Sequence[int]) -> None:
        build, stage = self._build, self.stage / FOLDER
        stage.mkdir(parents=True, exist_ok=True)
        self._sentences_again(build, again)
        watch = Quarantine(self.stage, shards=stage, clips=1, videos=0, fraction=float("inf"))
        embeddings = sentences.Embeddings(self.stage / "texts")
        make = replace(build.clip_pass(self._plan), shards=stage, embeddings=embeddings, quarantine=watch)
        for done, unit in enumerate(again):
            self.on_progress("units", done, len(again))
            make.write_unit(unit)
            self._move_in(unit, stage)
        self.on_progress("units", len(again), len(again))

    def _sentences_again(self, build: Build, again: Sequence[int]) -> None:
        """Encode the text units with these units' sentences; free the text encoder before the VAE is loaded."""
        texts = self.stage / "texts"
        texts.mkdir(exist_ok=True)
        numbers = {n for unit in again for _, numbers in self._plan.unit_clips(unit) for n in numbers}
        wanted = sorted({number // units.SENTENCES_PER_UNIT for number in numbers})
        for done, unit in enumerate(wanted):
            self.on_progress("sentences", done, len(wanted))
            build.write_text_unit(self._plan, unit, folder=texts)
        build.free("text_encoder")

    def _move_in(self, unit: int, stage: Path) -> None:
        """Replace a unit's shard, then its sidecar: a unit interrupted between the two is repaired the next time."""
        made = parse_sidecar((stage / sidecar_name(unit)).read_bytes())
        self._refuse_new_losses(made)
        before, sha256 = self._made_before(unit)
        if made.records:
            (stage / shard_name(unit)).replace(self.shards / shard_name(unit))
        else:
            (self.shards / shard_name(unit)).unlink(missing_ok=True)
        (stage / sidecar_name(unit)).replace(self.shards / sidecar_name(unit))
        same = sha256 == made.sha256
        bytes_are = "the same bytes" if same else "other bytes"
        self._mended(self.shards / shard_name(unit), f"encoded again: {bytes_are}")
        if before is not None and before != made.made_with:
            was, now = _spelt(before, made.made_with), _spelt(made.made_with, before)
            self.report.notes.append(
                f"unit {unit} was made with {was}, and now with {now}: equal within rounding, not to the bit"
            )
        elif sha256 and not same:
            self.report.notes.append(
                f"unit {unit} has other bytes than before, though made with the same libraries and kind of device"
            )

    def _refuse_new_losses(self, made: Sidecar) -> None:
        known = {line["clip"] for line in quarantine.read(self.folder / quarantine.FILE)}
        for line in made.quarantined:
            if line["clip"] not in known:
                raise CacheError(
                    f"cannot repair unit {made.unit} of {self.folder}: {line['file']}: {line['reason']}; it could be "
                    "read when the cache was made: mend it first"
                )

    def _made_before(self, unit: int) -> tuple[dict[str, str] | None, str]:
        """The environment that made a unit, and its shard's hash, if the sidecar or the manifest has them."""
        if sidecar := self._sidecar(unit):
            return sidecar.made_with, sidecar.sha256
        entry = self._entries.get(shard_name(unit))
        if self.manifest is None or entry is None:
            return None, ""
        return self.manifest.environments[entry.made_with], entry.sha256


def _hash(path: Path) -> str:
    try:
        return file_hash(path)[1]
    except WrongError:
        return ""


def _spelt(environment: dict[str, str], other: dict[str, str]) -> str:
    """The differences from the other environment."""
    return ", ".join(f"{name} {value}" for name, value in environment.items() if other.get(name) != value)
