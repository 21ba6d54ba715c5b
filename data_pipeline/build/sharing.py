"""Facts that the workers of a build share: its folder, and for each pass its units, claims and finished files.

Imports no torch and knows no encoder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowmask.data_pipeline.build import finalise, records
from flowmask.data_pipeline.cache import manifest
from flowmask.data_pipeline.cache.shards import FOLDER, listed_units, remove_leftovers, shard_name, sidecar_name
from flowmask.data_pipeline.claim.claims import SharedUnits, once
from flowmask.data_pipeline.plan import units
from flowmask.data_pipeline.plan.plan_file import listed_text_units, text_unit_path


@dataclass(frozen=True)
class SharedBuild:
    """The folder `out` of a build, as one of its workers uses it.

    worker, workers: spread the places where workers begin; others may join and leave
    """

    out: Path
    lease_s: float
    worker: int = 0
    workers: int = 1

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def claims(self) -> Path:
        return self.work / "claims"

    @property
    def texts(self) -> Path:
        return self.work / "texts"

    @property
    def shards(self) -> Path:
        return self.out / FOLDER

    @property
    def finished(self) -> Path:
        """The file that every finished cache has."""
        return self.out / manifest.FILE

    def plan(self, write: Callable[[Path], None]) -> units.BuildPlan:
        """The plan on the disk, after this or another worker has called `write` with its folder."""
        folder = self.out / units.FOLDER
        once(
            self.claims / "plan",
            done=lambda: units.read_plan(folder) is not None,
            work=lambda: write(folder),
            lease_s=self.lease_s,
            results=folder,
        )
        plan = units.read_plan(folder)
        assert plan is not None
        return plan

    def sentences(self, plan: units.BuildPlan) -> SharedUnits:
        texts = self.texts
        return SharedUnits(
            self._in_turn(plan.text_units),
            folder=self.claims,
            kind="text",
            done=lambda unit: text_unit_path(texts, unit).exists() or self.finished.exists(),
            listed=lambda: listed_text_units(texts),
            abandoned=lambda unit: remove_leftovers(texts, text_unit_path(texts, unit).name),
            lease_s=self.lease_s,
            results=texts,
        )

    def clips(self, plan: units.BuildPlan) -> SharedUnits:
        return SharedUnits(
            self._in_turn(plan.clip_units),
            folder=self.claims,
            kind="clips",
            done=lambda unit: records.read_sidecar(self.shards, unit) is not None,
            listed=lambda: listed_units(self.shards),
            abandoned=self._remove_halves,
            lease_s=self.lease_s,
            results=self.shards,
        )

    def finalise(self, plan: units.BuildPlan, *, make: Callable[[int], None]) -> None:
        """Return when any worker has finished the cache; make: makes a unit without a claim."""
        once(
            self.claims / "finalise",
            done=self.finished.exists,
            work=lambda: finalise.finalise(self.out, plan, make=make),
            lease_s=self.lease_s,
            results=self.out,
        )

    def _in_turn(self, count: int) -> Sequence[int]:
        """All units, from this worker's share on, so that workers seldom ask for the same unit."""
        first = count * self.worker // self.workers
        return [*range(first, count), *range(first)]

    def _remove_halves(self, unit: int) -> None:
        """Delete partial files of a killed worker; lists all shards, so call it only after a worker died."""
        for name in (shard_name(unit), sidecar_name(unit)):
            remove_leftovers(self.shards, name)
