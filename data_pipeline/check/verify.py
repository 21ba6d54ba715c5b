"""`flowmask cache verify`: re-read everything and name each file that is wrong, and no file that is right.

Sidecars and plan carry their own hash, so each is judged alone. A shard is compared with its own content
and its sidecar; index and manifest are functions of the sidecars, so they are made anew and compared. A
damaged file thus never speaks against another one.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.build import finalise
from flowmask.data_pipeline.build.records import Sidecar, parse_sidecar
from flowmask.data_pipeline.cache import index, manifest, quarantine
from flowmask.data_pipeline.cache.manifest import FileEntry, Fingerprint, Manifest, ShardEntry, read_manifest
from flowmask.data_pipeline.cache.quarantine import Line
from flowmask.data_pipeline.cache.sealed import unseal
from flowmask.data_pipeline.cache.shards import FOLDER, shard_name, sidecar_name
from flowmask.data_pipeline.check.verify_masks import MaskSample, check_masks
from flowmask.data_pipeline.check.verify_report import Problem, VerifyReport
from flowmask.data_pipeline.check.verify_shard import ShardContent, Storage, WrongError, file_hash, read_shard
from flowmask.data_pipeline.plan import units
from flowmask.models.errors import CacheError, UserError

OnProgress = Callable[[str, int, int], None]


def verify(
    folder: Path,
    *,
    decode_masks: int = 0,
    wan: Path | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda *_: None,
) -> VerifyReport:
    """Check a finished cache; CacheError if it is none, all else is in the report.

    decode_masks: how many masks, drawn by `seed` from the shards that are right, are decoded and compared
    wan: the weights folder with the cache's VAE; by default where the build's config says it was
    """
    return _Verification(folder, masks=MaskSample(decode_masks, seed=seed)).run(
        wan=wan, wanted=decode_masks, on_progress=on_progress
    )


class _Verification:
    """One pass over a cache. `derived` are sidecars made anew from right shards, for those that are damaged."""

    def __init__(self, folder: Path, *, masks: MaskSample):
        self.folder, self.shards, self.masks = folder, folder / FOLDER, masks
        self.report = VerifyReport()
        self.manifest = self._manifest()
        self.plan = self._plan()
        self.entries = {e.file: e for e in self.manifest.shards} if self.manifest else {}
        self.derived: dict[int, Sidecar] = {}
        self.unknown: set[int] = set()
        self.wrong_shards: set[str] = set()

    def run(self, *, wan: Path | None, wanted: int, on_progress: OnProgress) -> VerifyReport:
        facts = self._facts()
        count = self._units()
        for unit in range(count):
            on_progress("shards", unit, count)
            self._unit(unit, storage=Storage.of(*facts))
        on_progress("shards", count, count)
        if self.unknown:
            self._index_by_hash()
        else:
            self._index_and_manifest(count, facts)
        if self.manifest:
            self.report.examples = self.manifest.examples
            self.report.environments = self.manifest.environments
        if wanted:
            self._decode(wan, Storage.of(*facts), on_progress)
        self.report.problems.sort(key=lambda problem: str(problem.file))
        return self.report

    def _wrong(self, file: Path, reason: str, unit: int | None = None) -> None:
        self.report.problems.append(Problem(file, reason, unit))

    def _manifest(self) -> Manifest | None:
        try:
            return read_manifest(self.folder)
        except CacheError as error:
            if not (self.folder / manifest.FILE).exists():
                raise
            self._wrong(self.folder / manifest.FILE, _after_path(error, self.folder / manifest.FILE))
            return None

    def _plan(self) -> units.BuildPlan | None:
        """The plan if all of its files are right."""
        folder = self.folder / units.FOLDER
        right = True
        try:
            hashes = unseal((folder / "plan.json").read_bytes())["files"]
        except FileNotFoundError:
            self._wrong(folder / "plan.json", "missing")
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._wrong(folder / "plan.json", f"damaged: {error}")
            return None
        for name, expected in sorted(hashes.items()):
            try:
                if file_hash(folder / name)[1] != expected:
                    raise WrongError("its SHA-256 is not that of plan.json: a byte has changed")
            except WrongError as wrong:
                self._wrong(folder / name, str(wrong))
                right = False
        return units.read_plan(folder) if right else None

    def _facts(self) -> tuple[Fingerprint, dict[str, Any]]:
        """Fingerprint and facts of the plan; from the manifest where the plan is damaged."""
        if self.plan:
            return self.plan.fingerprint, self.plan.facts
        try:
            plan = unseal((self.folder / units.FOLDER / "plan.json").read_bytes())
            return Fingerprint.model_validate(plan["fingerprint"]), plan["facts"]
        except (OSError, ValueError, KeyError):
            if self.manifest is None:
                raise CacheError(
                    f"{self.folder}: neither {manifest.FILE} nor {units.FOLDER}/plan.json can be read: delete "
                    "the cache and build it again"
                ) from None
            return self.manifest.fingerprint, self.manifest.model_dump()

    def _units(self) -> int:
        if self.plan:
            return self.plan.clip_units
        numbers = [int(path.stem) for path in self.shards.glob("[0-9]*.json")]
        return max([*numbers, *(int(Path(name).stem) for name in self.entries)], default=-1) + 1

    def _unit(self, unit: int, *, storage: Storage) -> None:
        """Judge a unit's sidecar and its shard, each alone."""
        path, entry = self.shards / shard_name(unit), self.entries.get(shard_name(unit))
        sidecar = self._sidecar(unit)
        if sidecar.records == 0 if sidecar else entry is None and not path.exists():
            if sidecar is None:
                self.unknown.add(unit)
            return
        self.report.shards += 1
        try:
            content, size, sha256 = self._shard(path, unit, sidecar, entry, storage=storage)
        except WrongError as wrong:
            self._wrong(path, str(wrong), unit)
            self.wrong_shards.add(path.name)
            if sidecar is None:
                self.unknown.add(unit)
            return
        self.report.records += content.records
        if sidecar is None:
            if self.manifest is None or entry is None:
                self.unknown.add(unit)
                return
            sidecar = self.derived[unit] = derived_sidecar(
                unit,
                content,
                size=size,
                sha256=sha256,
                dropped=0,
                quarantined=[],
                made_with=self.manifest.environments[entry.made_with],
            )
        self.masks.offer(sidecar, path)

    def _sidecar(self, unit: int) -> Sidecar | None:
        path = self.shards / sidecar_name(unit)
        try:
            sidecar = parse_sidecar(path.read_bytes())
            if sidecar.unit != unit:
                raise ValueError(f"it is the sidecar of unit {sidecar.unit}")
        except FileNotFoundError:
            self._wrong(path, "missing", unit)
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._wrong(path, f"damaged: {error}", unit)
        else:
            return sidecar
        return None

    def _shard(
        self, path: Path, unit: int, sidecar: Sidecar | None, entry: ShardEntry | None, *, storage: Storage
    ) -> tuple[ShardContent, int, str]:
        """Content, size and hash of a right shard. A sidecar that agrees with the file outweighs the manifest."""
        size, sha256 = file_hash(path)
        known = {e.sha256: e.size for e in (sidecar, entry) if e is not None}
        if known and sha256 not in known:
            expected = sidecar.size if sidecar else next(iter(known.values()))
            if size != expected:
                raise WrongError(f"{size} bytes, it was written with {expected}")
            raise WrongError("its SHA-256 is not the one it was written with: a byte has changed")
        content = read_shard(path, unit=unit, storage=storage)
        if sidecar and (content.examples, content.shapes) != (sidecar.examples, sidecar.shapes):
            raise WrongError("its records are not those that its sidecar, and so the index, speaks of")
        if sidecar and sha256 != sidecar.sha256:
            raise WrongError("its SHA-256 is not that of its sidecar")
        return content, size, sha256

    def _effective(self, count: int) -> Iterator[Sidecar]:
        for unit in range(count):
            if unit in self.derived:
                yield self.derived[unit]
            else:
                yield parse_sidecar((self.shards / sidecar_name(unit)).read_bytes())

    def _index_and_manifest(self, count: int, facts: tuple[Fingerprint, dict[str, Any]]) -> None:
        """Both are made anew from the sidecars; the index in a temporary file, not in the cache."""
        fingerprint, rest = facts
        totals = finalise.count(self._effective(count), views=fingerprint.fields["cache.views"])
        self.report.examples = sum(sum(bucket.examples) for bucket in totals.buckets)
        self.report.environments = totals.environments
        with tempfile.TemporaryFile() as file:
            expected = finalise.write_index(file, self._effective(count), buckets=totals.buckets)
        self._index(expected)
        self._quarantine(count)
        if self.manifest is None:
            return
        made = finalise.make_manifest(fingerprint, rest, totals, index_entry=expected)
        reason = _difference(self.manifest, self._excused(made))
        if reason:
            self._wrong(self.folder / manifest.FILE, reason)

    def _excused(self, made: Manifest) -> Manifest:
        """Without what the manifest is not to blame for: entries of wrong shards, counts of damaged sidecars."""
        assert self.manifest is not None
        shards = [
            self.entries.get(entry.file, entry) if entry.file in self.wrong_shards else entry
            for entry in made.shards
        ]
        update: dict[str, Any] = {"shards": shards}
        if self.derived:
            for name in ("dropped_empty_masks", "quarantined_clips"):
                update[name] = getattr(self.manifest, name)
        return made.model_copy(update=update)

    def _index(self, expected: FileEntry) -> None:
        path = self.folder / index.FILE
        try:
            size, sha256 = file_hash(path)
            if size != expected.size:
                raise WrongError(f"{size} bytes, the sidecars say {expected.size}")
            if sha256 != expected.sha256:
                raise WrongError("it is not the index that follows from the sidecars: a byte has changed")
        except WrongError as wrong:
            self._wrong(path, str(wrong))

    def _quarantine(self, count: int) -> None:
        """quarantine.jsonl is what the plan and the sidecars set aside, line by line."""
        if self.plan is None or self.derived:
            return
        lines = quarantine.read(self.plan.folder / quarantine.FILE)
        lines += [line for sidecar in self._effective(count) for line in sidecar.quarantined]
        path = self.folder / quarantine.FILE
        try:
            if path.read_bytes() != quarantine.to_bytes(lines):
                self._wrong(path, "it is not what the plan and the sidecars set aside: a byte has changed")
        except OSError as error:
            self._wrong(path, "missing" if isinstance(error, FileNotFoundError) else str(error.strerror))

    def _index_by_hash(self) -> None:
        """Where a unit has lost both shard and sidecar, the manifest alone knows the index."""
        if self.manifest is not None:
            self._index(self.manifest.index)

    def _decode(self, wan: Path | None, storage: Storage, on_progress: OnProgress) -> None:
        from flowmask.data_pipeline.show.inspect_examples import vae_of

        report = self.report
        if not self.masks.chosen:
            report.not_decoded = "no shard is right"
            return
        fingerprint, _ = self._facts()
        try:
            vae = vae_of(
                self.folder, fingerprint, wan=wan, otherwise="give the folder of its weights with --wan"
            )
        except UserError as error:
            if wan is not None:
                raise
            report.not_decoded = str(error)
            return
        report.masks = check_masks(self.masks.chosen, vae, storage=storage, on_progress=on_progress)
        for check in report.masks:
            if check.reason:
                self._wrong(check.file, check.reason, int(check.file.stem))


def derived_sidecar(
    unit: int,
    content: ShardContent,
    *,
    size: int,
    sha256: str,
    dropped: int,
    quarantined: list[Line],
    made_with: dict[str, str],
) -> Sidecar:
    """A sidecar made anew from its right shard, and what a shard does not hold."""
    return Sidecar(
        unit=unit,
        records=content.records,
        dropped_empty_masks=dropped,
        quarantined=quarantined,
        size=size,
        sha256=sha256,
        text_dim=content.text_dim,
        made_with=made_with,
        shapes=content.shapes,
        examples=content.examples,
    )


def _difference(found: Manifest, expected: Manifest) -> str:
    """The first field in which a manifest is not what follows from the sidecars and the plan."""
    theirs, ours = found.model_dump(), expected.model_dump()
    for name in ours:
        if theirs[name] != ours[name]:
            return f"its field {name} is not what follows from the plan and the sidecars: a byte has changed"
    return ""


def _after_path(error: CacheError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
