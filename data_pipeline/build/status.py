"""`flowmask cache status`: the progress of a build, read only from its folder, on any node, changing nothing.

Ages use the filesystem's clock, so they are right on every node.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from flowmask.data_pipeline.cache import manifest, quarantine
from flowmask.data_pipeline.cache.shards import FOLDER, sidecar_name
from flowmask.data_pipeline.claim.claims import claims_in
from flowmask.data_pipeline.claim.leases import WORKER, State, filesystem_now, read_lease
from flowmask.data_pipeline.plan import plan_file
from flowmask.models.errors import CacheError

Phase = Literal["plan", "text", "clips", "finalise", "complete"]
_WINDOW_S, _WINDOW_UNITS = 600.0, 4  # the rate covers ten minutes and at least four units


@dataclass(frozen=True)
class Count:
    done: int
    total: int


@dataclass(frozen=True)
class LeaseStatus:
    """One claimed unit: its owner, the time since the claim, and the seconds since the owner's last heartbeat."""

    unit: str
    host: str
    pid: int
    held_s: float
    silent_s: float
    state: State


@dataclass(frozen=True)
class CacheStatus:
    """A cache at this moment. rate_per_s and eta_s are of the phase: sentences in "text", else clips."""

    folder: str
    phase: Phase
    sentences: Count | None = None
    clips: Count | None = None
    units: Count | None = None  # shards
    examples: int | None = None  # known once the cache is finished
    rate_per_s: float | None = None
    eta_s: float | None = None
    workers_alive: int = 0
    leases: list[LeaseStatus] = field(default_factory=list)
    quarantined: int = 0


def status(folder: Path) -> CacheStatus:
    """Read the progress of the cache in `folder`; CacheError if the folder has no cache, finished or begun."""
    if (folder / manifest.FILE).exists():
        return _finished(folder)
    claims = folder / "work" / "claims"
    plan = _read_plan(folder / plan_file.FOLDER / "plan.json")
    if plan is None and not claims.is_dir():
        what = "holds no cache, finished or begun" if folder.is_dir() else "no such folder"
        raise CacheError(f"{folder}: {what}; `flowmask cache build` makes one")
    now_ns = filesystem_now(claims)
    alive = _alive_workers(claims, now_ns)
    begun = CacheStatus(str(folder), "plan", workers_alive=alive, quarantined=_quarantined(folder))
    if plan is None:
        return replace(begun, leases=list(_leases(claims, now_ns, finished=set())))
    texts = _text_units(folder / "work" / "texts", plan.texts)
    shards = _clip_units(folder / FOLDER, plan)
    phase: Phase = "finalise" if shards.complete else "clips" if texts.complete else "text"
    current = {"text": texts, "clips": shards}.get(phase)
    rate = current.rate_per_s(now_ns) if current and alive else None
    texts_done = {f"text-{unit:06d}" for unit in texts.ended}
    clips_done = {f"clips-{unit:06d}" for unit in shards.ended}
    return replace(
        begun,
        phase=phase,
        sentences=texts.things,
        clips=shards.things,
        units=Count(len(shards.ended), len(shards.sizes)),
        rate_per_s=rate,
        eta_s=(current.things.total - current.things.done) / rate if current and rate else None,
        leases=list(_leases(claims, now_ns, finished=texts_done | clips_done)),
    )


@dataclass(frozen=True)
class _Pass:
    """Units of one pass: the number of things in each, and when (filesystem's ns) finished ones were written."""

    sizes: Sequence[int]
    ended: dict[int, int]

    @property
    def things(self) -> Count:
        return Count(sum(self.sizes[unit] for unit in self.ended), sum(self.sizes))

    @property
    def complete(self) -> bool:
        return len(self.ended) == len(self.sizes)

    def rate_per_s(self, now_ns: int) -> float | None:
        """Things per second in the recent window; None with fewer than two units."""
        ended = sorted(self.ended.items(), key=lambda item: -item[1])
        recent = [item for item in ended if now_ns - item[1] < _WINDOW_S * 1e9]
        recent = recent if len(recent) >= _WINDOW_UNITS else ended[:_WINDOW_UNITS]
        if len(recent) < 2:
            return None
        first_ns, last_ns = recent[-1][1], recent[0][1]
        usual_ns = (last_ns - first_ns) / (len(recent) - 1)
        until_ns = now_ns if now_ns - last_ns > 2 * usual_ns else last_ns  # the rate of a hanging build falls
        made = sum(self.sizes[unit] for unit, _ in recent[:-1])
        return made / max((until_ns - first_ns) / 1e9, 1e-3)


def _finished(folder: Path) -> CacheStatus:
    cache = manifest.read_manifest(folder)
    return CacheStatus(
        folder=str(folder),
        phase="complete",
        clips=Count(cache.clips, cache.clips),
        units=Count(len(cache.shards), len(cache.shards)),
        examples=cache.examples,
        quarantined=_quarantined(folder),
    )


def _read_plan(path: Path) -> plan_file.PlanFile | None:
    try:
        plan = plan_file.read_plan_file(path)
        clips, listed = sum(view.clips for view in plan.costs), path.with_name("clips.jsonl")
        listed_texts = path.with_name("texts.jsonl").stat().st_size
        if _per_unit(plan) < 1 or clips > listed.stat().st_size or plan.texts > listed_texts:
            raise ValueError("it has more clips or sentences than its tables")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"damaged, or of another version of flowmask ({error})"
        raise CacheError(f"{path}: {reason}; delete {path.parents[1]} and build again") from error
    return plan


def _sizes(things: int, *, per_unit: int) -> list[int]:
    return [min(per_unit, things - first) for first in range(0, things, per_unit)]


def _text_units(folder: Path, texts: int) -> _Pass:
    sizes = _sizes(texts, per_unit=plan_file.SENTENCES_PER_UNIT)
    names = {plan_file.text_unit_path(folder, unit).name: unit for unit in range(len(sizes))}
    return _Pass(sizes, _written(folder, names))


def _per_unit(plan: plan_file.PlanFile) -> int:
    """Clips per shard; KeyError or ValueError if the plan does not say it."""
    return int(plan.fingerprint.fields["cache.clips_per_shard"])


def _clip_units(folder: Path, plan: plan_file.PlanFile) -> _Pass:
    sizes = list(chain.from_iterable(_sizes(view.clips, per_unit=_per_unit(plan)) for view in plan.costs))
    return _Pass(sizes, _written(folder, {sidecar_name(unit): unit for unit in range(len(sizes))}))


def _written(folder: Path, names: dict[str, int]) -> dict[int, int]:
    """The named files that exist, with their times."""
    try:
        with os.scandir(folder) as entries:
            return {names[entry.name]: entry.stat().st_mtime_ns for entry in entries if entry.name in names}
    except FileNotFoundError:
        return {}


def _alive_workers(claims: Path, now_ns: int) -> int:
    leases = (read_lease(path) for path in claims.glob(f"{WORKER}*"))
    return sum(lease is not None and lease.state(now_ns) == "alive" for lease in leases)


def _leases(claims: Path, now_ns: int, *, finished: set[str]) -> Iterable[LeaseStatus]:
    for found in claims_in(claims):
        if found.name in finished or found.lease is None:
            continue
        owner = found.lease.owner
        yield LeaseStatus(
            unit=found.name,
            host=owner.host if owner else "?",
            pid=owner.pid if owner else 0,
            held_s=max(0.0, (now_ns - found.since_ns) / 1e9),
            silent_s=max(0.0, (now_ns - found.lease.beat_ns) / 1e9),
            state=found.lease.state(now_ns),
        )


def _quarantined(folder: Path) -> int:
    """Lines of quarantine.jsonl, or of the files that become it."""
    if (folder / quarantine.FILE).exists():
        return len(quarantine.read(folder / quarantine.FILE))
    live = (folder / "work" / quarantine.LIVE).glob("*.jsonl")
    planned = folder / plan_file.FOLDER / quarantine.FILE
    return sum(len(quarantine.read(path)) for path in [planned, *live])
