"""`flowmask cache status`: how a build is getting on, read from its folder alone, from any node, changing nothing.

Ages are by the filesystem's clock, so that they are right wherever this runs.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from flowmask.data_pipeline.build import sentences
from flowmask.data_pipeline.cache import manifest, quarantine
from flowmask.data_pipeline.cache.shards import FOLDER, sidecar_name
from flowmask.data_pipeline.claim.claims import claims_in
from flowmask.data_pipeline.claim.leases import WORKER, State, filesystem_now, read_lease
from flowmask.data_pipeline.plan import units
from flowmask.models.errors import CacheError

Phase = Literal["plan", "text", "clips", "finalise", "complete"]
_WINDOW_S, _WINDOW_UNITS = 600.0, 4  # the rate is of the last ten minutes, and of at least so many units


@dataclass(frozen=True)
class Count:
    done: int
    total: int


@dataclass(frozen=True)
class LeaseStatus:
    """One unit in hand: whose, for how long, and the seconds since its owner's last sign of life."""

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
    sentences: Count | None
    clips: Count | None
    units: Count | None  # shards
    examples: int | None  # known of a finished cache
    rate_per_s: float | None
    eta_s: float | None
    workers_alive: int
    leases: list[LeaseStatus]
    quarantined: int


def status(folder: Path) -> CacheStatus:
    """Read how far the cache in `folder` is; CacheError if there is none, finished or begun."""
    if (folder / manifest.FILE).exists():
        return _finished(folder)
    claims = folder / "work" / "claims"
    plan = _read_plan(folder / units.FOLDER / "plan.json")
    if plan is None and not claims.is_dir():
        what = "holds no cache, finished or begun" if folder.is_dir() else "no such folder"
        raise CacheError(f"{folder}: {what}; `flowmask cache build` makes one")
    now_ns = filesystem_now(claims)
    alive = _alive_workers(claims, now_ns)
    if plan is None:
        nothing = _Progress("plan", None, None, None, None)
        return _building(folder, nothing, now_ns=now_ns, alive=alive, finished=set())
    texts = _text_units(folder / "work" / "texts", plan["texts"])
    shards = _clip_units(folder / FOLDER, plan)
    progress = _progress(plan, texts, shards, now_ns=now_ns if alive else None)
    finished = {*(f"text-{unit:06d}" for unit in texts.ended), *(f"clips-{unit:06d}" for unit in shards.ended)}
    return _building(folder, progress, now_ns=now_ns, alive=alive, finished=finished)


@dataclass(frozen=True)
class _Pass:
    """The units of one pass: how many things each holds, and when (filesystem's ns) the finished ones were written."""

    sizes: Sequence[int]
    ended: dict[int, int]

    @property
    def things(self) -> Count:
        return Count(sum(self.sizes[unit] for unit in self.ended), sum(self.sizes))

    @property
    def complete(self) -> bool:
        return len(self.ended) == len(self.sizes)

    def rate_per_s(self, now_ns: int) -> float | None:
        """Things a second in the recent window; None while fewer than two units tell."""
        ended = sorted(self.ended.items(), key=lambda item: -item[1])
        recent = [item for item in ended if now_ns - item[1] < _WINDOW_S * 1e9]
        recent = recent if len(recent) >= _WINDOW_UNITS else ended[:_WINDOW_UNITS]
        if len(recent) < 2:
            return None
        first_ns, last_ns = recent[-1][1], recent[0][1]
        usual_ns = (last_ns - first_ns) / (len(recent) - 1)
        until_ns = now_ns if now_ns - last_ns > 2 * usual_ns else last_ns  # a build that hangs becomes slower
        made = sum(self.sizes[unit] for unit, _ in recent[:-1])
        return made / max((until_ns - first_ns) / 1e9, 1e-3)


@dataclass(frozen=True)
class _Progress:
    phase: Phase
    texts: _Pass | None
    shards: _Pass | None
    rate_per_s: float | None
    eta_s: float | None


def _progress(plan: dict[str, Any], texts: _Pass, shards: _Pass, *, now_ns: int | None) -> _Progress:
    """now_ns: None if nobody works on it, then there is no rate."""
    phase: Phase = "finalise" if shards.complete else "text" if not texts.complete else "clips"
    of = {"text": texts, "clips": shards}.get(phase)
    rate = of.rate_per_s(now_ns) if of and now_ns is not None else None
    eta = (of.things.total - of.things.done) / rate if of and rate else None
    return _Progress(phase, texts, shards, rate, eta)


def _building(folder: Path, progress: _Progress, *, now_ns: int, alive: int, finished: set[str]) -> CacheStatus:
    shards = progress.shards
    return CacheStatus(
        folder=str(folder),
        phase=progress.phase,
        sentences=progress.texts.things if progress.texts else None,
        clips=shards.things if shards else None,
        units=Count(len(shards.ended), len(shards.sizes)) if shards else None,
        examples=None,
        rate_per_s=progress.rate_per_s,
        eta_s=progress.eta_s,
        workers_alive=alive,
        leases=list(_leases(folder / "work" / "claims", now_ns, finished=finished)),
        quarantined=_quarantined(folder),
    )


def _finished(folder: Path) -> CacheStatus:
    cache = manifest.read_manifest(folder)
    clips, shards = Count(cache.clips, cache.clips), Count(len(cache.shards), len(cache.shards))
    return CacheStatus(
        folder=str(folder),
        phase="complete",
        sentences=None,
        clips=clips,
        units=shards,
        examples=cache.examples,
        rate_per_s=None,
        eta_s=None,
        workers_alive=0,
        leases=[],
        quarantined=_quarantined(folder),
    )


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        plan: dict[str, Any] = json.loads(path.read_bytes())
        _ = plan["texts"], plan["costs"], plan["fingerprint"]["fields"]["cache.clips_per_shard"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"damaged, or of another version of flowmask ({error})"
        raise CacheError(f"{path}: {reason}; delete {path.parents[1]} and build again") from error
    return plan


def _sizes(things: int, *, per_unit: int) -> list[int]:
    return [min(per_unit, things - first) for first in range(0, things, per_unit)]


def _text_units(folder: Path, texts: int) -> _Pass:
    sizes = _sizes(texts, per_unit=units.SENTENCES_PER_UNIT)
    names = {sentences.unit_path(folder, unit).name: unit for unit in range(len(sizes))}
    return _Pass(sizes, _written(folder, names))


def _clip_units(folder: Path, plan: dict[str, Any]) -> _Pass:
    per_unit = plan["fingerprint"]["fields"]["cache.clips_per_shard"]
    views = (view["clips"] for view in plan["costs"])
    sizes = list(chain.from_iterable(_sizes(clips, per_unit=per_unit) for clips in views))
    return _Pass(sizes, _written(folder, {sidecar_name(unit): unit for unit in range(len(sizes))}))


def _written(folder: Path, names: dict[str, int]) -> dict[int, int]:
    """Of the named files those that exist, with their times."""
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
    """Lines of quarantine.jsonl, or of what will become it."""
    if (folder / quarantine.FILE).exists():
        return len(quarantine.read(folder / quarantine.FILE))
    live = (folder / "work" / quarantine.LIVE).glob("*.jsonl")
    planned = folder / units.FOLDER / quarantine.FILE
    return sum(len(quarantine.read(path)) for path in [planned, *live])
