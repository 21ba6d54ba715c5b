"""`flowmask cache verify`: reads everything again and names each wrong file, and no correct file.

Sidecars and plan contain their own hash, so each is checked alone. A shard is compared with its content and its
sidecar. Index and manifest follow from the sidecars, so they are computed again and compared. So a damaged file
never causes a report about another file.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.build import finalise
from flowmask.data_pipeline.build.records import Rows, Sidecar, parse_sidecar
from flowmask.data_pipeline.cache import index, manifest, quarantine
from flowmask.data_pipeline.cache.manifest import FileEntry, Fingerprint, Manifest, ShardEntry, read_manifest
from flowmask.data_pipeline.cache.shards import FOLDER, shard_name, sidecar_name
from flowmask.data_pipeline.check.verify_masks import MaskSample, check_masks
from flowmask.data_pipeline.check.verify_report import Problem, VerifyReport
from flowmask.data_pipeline.check.verify_shard import Storage, WrongError, facts_of, file_hash, parsed, read_shard
from flowmask.data_pipeline.plan import units
from flowmask.data_pipeline.plan.units import BuildPlan
from flowmask.data_pipeline.show.inspect_cache import OnProgress
from flowmask.models.device import gpu_holds
from flowmask.models.errors import CacheError, UserError
from flowmask.models.stored.sealed import unseal


def verify(
    folder: Path,
    *,
    decode_masks: int = 0,
    wan: Path | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda *_: None,
) -> VerifyReport:
    """Check a finished cache; CacheError if it is not finished; all other findings are in the report.

    decode_masks: the number of masks, drawn by `seed` from correct shards, that are decoded and compared
    wan: the weights folder with the cache's VAE; by default the one in the build's config
    """
    return _Verification(folder, masks=MaskSample(decode_masks, seed=seed)).run(
        wan=wan, wanted=decode_masks, on_progress=on_progress
    )


class _Verification:
    """One pass over a cache. `derived` are sidecars made from correct shards in place of damaged ones."""

    def __init__(self, folder: Path, *, masks: MaskSample):
        self.folder, self.shards, self.masks = folder, folder / FOLDER, masks
        self.report = VerifyReport()
        self.manifest = self._manifest()
        self.plan = self._plan()
        self.entries = {e.file: e for e in self.manifest.shards} if self.manifest else {}
        self.derived: dict[int, Sidecar] = {}
        self.unknown: set[int] = set()

    def run(self, *, wan: Path | None, wanted: int, on_progress: OnProgress) -> VerifyReport:
        facts = facts_of(self.folder, self.manifest)
        count, storage = self._units(), Storage.of(*facts)
        for unit in range(count):
            on_progress("shards", unit, count)
            self._unit(unit, storage=storage)
        on_progress("shards", count, count)
        if not self.unknown:
            self._index_and_manifest(count, facts)
        elif self.manifest:  # both shard and sidecar are missing: only the manifest knows the index
            self._index(self.manifest.index)
        if self.manifest:
            self.report.examples = self.manifest.examples
            self.report.environments = self.manifest.environments
        if wanted:
            self._decode(wan, facts[0], storage, on_progress)
        self.report.problems.sort(key=lambda problem: str(problem.file))
        return self.report

    @contextmanager
    def _judge(self, file: Path, unit: int | None = None) -> Iterator[None]:
        """Report an error in the block as a fault of this file."""
        try:
            yield
        except WrongError as wrong:
            self.report.problems.append(Problem(file, str(wrong), unit))

    def _manifest(self) -> Manifest | None:
        path = self.folder / manifest.FILE
        with self._judge(path):
            try:
                return read_manifest(self.folder)
            except CacheError as error:
                if not path.exists():
                    raise
                raise WrongError(str(error).removeprefix(f"{path}: ")) from error
        return None

    def _plan(self) -> BuildPlan | None:
        """The plan if all of its files are right."""
        folder = self.folder / units.FOLDER
        before = len(self.report.problems)
        with self._judge(folder / "plan.json"):
            hashes = parsed(folder / "plan.json", lambda content: unseal(content)["files"])
            for name, expected in sorted(hashes.items()):
                with self._judge(folder / name):
                    if file_hash(folder / name)[1] != expected:
                        raise WrongError("its SHA-256 is not that of plan.json: a byte has changed")
        return units.read_plan(folder) if len(self.report.problems) == before else None

    def _units(self) -> int:
        if self.plan:
            return self.plan.clip_units
        names = [*self.entries, *(path.name for path in self.shards.glob("[0-9]*.json"))]
        return max((int(Path(name).stem) for name in names), default=-1) + 1

    def _unit(self, unit: int, *, storage: Storage) -> None:
        """Judge a unit's sidecar and its shard, each alone."""
        path, entry = self.shards / shard_name(unit), self.entries.get(shard_name(unit))
        sidecar = self._sidecar(unit)
        if sidecar is not None and not sidecar.records:
            return
        found = None
        if sidecar is not None or entry is not None or path.exists():
            self.report.shards += 1
            with self._judge(path, unit):
                found = self._shard(path, unit, sidecar, entry, storage=storage)
                self.report.records += found[0].records
        if found is not None and sidecar is None and self.manifest is not None and entry is not None:
            rows, size, sha256 = found
            made_with = self.manifest.environments[entry.made_with]
            sidecar = self.derived[unit] = rows.sidecar(
                unit=unit, size=size, sha256=sha256, dropped_empty_masks=0, made_with=made_with
            )
        if sidecar is None:
            self.unknown.add(unit)
        elif found is not None:
            self.masks.offer(sidecar, path)

    def _sidecar(self, unit: int) -> Sidecar | None:
        path = self.shards / sidecar_name(unit)
        with self._judge(path, unit):
            sidecar = parsed(path, parse_sidecar)
            if sidecar.unit != unit:
                raise WrongError(f"damaged: it is the sidecar of unit {sidecar.unit}")
            return sidecar
        return None

    def _shard(
        self, path: Path, unit: int, sidecar: Sidecar | None, entry: ShardEntry | None, *, storage: Storage
    ) -> tuple[Rows, int, str]:
        """Content, size and hash of a correct shard. If sidecar and manifest disagree about it, the sidecar decides."""
        size, sha256 = file_hash(path)
        known = {e.sha256: e.size for e in (sidecar, entry) if e is not None}
        if known and sha256 not in known:
            expected = sidecar.size if sidecar else next(iter(known.values()))
            if size != expected:
                raise WrongError(f"{size} bytes, it was written with {expected}")
            raise WrongError("its SHA-256 is not the one it was written with: a byte has changed")
        rows = read_shard(path, unit=unit, storage=storage)
        if sidecar and (rows.examples, rows.shapes) != (sidecar.examples, sidecar.shapes):
            raise WrongError("its records are not those that its sidecar, and so the index, speaks of")
        if sidecar and sha256 != sidecar.sha256:
            raise WrongError("its SHA-256 is not that of its sidecar")
        return rows, size, sha256

    def _effective(self, count: int) -> Iterator[Sidecar]:
        for unit in range(count):
            if unit in self.derived:
                yield self.derived[unit]
            else:
                yield parse_sidecar((self.shards / sidecar_name(unit)).read_bytes())

    def _index_and_manifest(self, count: int, facts: tuple[Fingerprint, dict[str, Any]]) -> None:
        """Compute both again from the sidecars; the index in a temporary file, not in the cache."""
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
        ours, theirs = self._excused(made).model_dump(exclude={"schema_version"}), self.manifest.model_dump()
        with self._judge(self.folder / manifest.FILE):
            if differing := next((name for name in ours if theirs[name] != ours[name]), None):
                raise WrongError(
                    f"its field {differing} differs from what the plan and the sidecars give: a byte has changed"
                )

    def _excused(self, made: Manifest) -> Manifest:
        """Removes differences that other files cause: entries of wrong shards, counts of damaged sidecars."""
        assert self.manifest is not None
        wrong = {problem.file.name for problem in self.report.problems}
        shards = [self.entries.get(e.file, e) if e.file in wrong else e for e in made.shards]
        update: dict[str, Any] = {"shards": shards}
        if self.derived:
            for name in ("dropped_empty_masks", "quarantined_clips"):
                update[name] = getattr(self.manifest, name)
        return made.model_copy(update=update)

    def _index(self, expected: FileEntry) -> None:
        path = self.folder / index.FILE
        with self._judge(path):
            size, sha256 = file_hash(path)
            if size != expected.size:
                raise WrongError(f"{size} bytes, the sidecars say {expected.size}")
            if sha256 != expected.sha256:
                raise WrongError("it is not the index that follows from the sidecars: a byte has changed")

    def _quarantine(self, count: int) -> None:
        """quarantine.jsonl must have exactly the lines of the plan and of the sidecars."""
        if self.plan is None or self.derived:
            return
        lines = quarantine.read(self.plan.folder / quarantine.FILE)
        lines += [line for sidecar in self._effective(count) for line in sidecar.quarantined]
        path = self.folder / quarantine.FILE
        with self._judge(path):
            if parsed(path, bytes) != quarantine.to_bytes(lines):
                raise WrongError("it differs from the lines of the plan and the sidecars: a byte has changed")

    def _decode(self, wan: Path | None, fingerprint: Fingerprint, storage: Storage, on_progress: OnProgress) -> None:
        from flowmask.data_pipeline.show.inspect_examples import WITHOUT_GPU, vae_of

        report = self.report
        if not self.masks.chosen:
            report.not_decoded = "no shard is right"
            return
        try:
            vae = vae_of(self.folder, fingerprint, wan=wan, otherwise="give the folder of its weights with --wan")
        except UserError as error:
            if wan is not None:
                raise
            report.not_decoded = str(error)
            return
        with gpu_holds("a decoded mask", fix=WITHOUT_GPU):
            report.masks = check_masks(self.masks.chosen, vae, storage=storage, on_progress=on_progress)
        report.problems += [Problem(m.file, m.reason, int(m.file.stem)) for m in report.masks if m.reason]
