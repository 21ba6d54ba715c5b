"""`flowmask tune`: reads the config, searches within a time limit, writes the config with the fastest settings."""

import copy
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowmask.launch.check import preflight
from flowmask.launch.config import validate
from flowmask.launch.console import err
from flowmask.launch.jobs import EvaluateJob, TrainJob, read_any
from flowmask.launch.jobs.job import Job
from flowmask.launch.progress import told
from flowmask.launch.tune.axes import KEYS, axes_of
from flowmask.launch.tune.here import Room, hardware, processes
from flowmask.launch.tune.search import Changes, Search, Timing
from flowmask.launch.tune.trials import Trials
from flowmask.models.errors import ConfigError
from flowmask.models.files import write_atomically
from flowmask.trainer.state.steps import newest

Tree = dict[Any, Any]


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    unit: the timed unit; where: the machine in words; timings: of every candidate, in order; tree: the config
    with the best changes; time_is_over: more settings could have been tried.
    """

    unit: str
    where: str
    timings: list[Timing]
    best: Timing
    tree: Tree
    time_is_over: bool

    def speed_up(self, timing: Timing) -> float | None:
        """Speed relative to the given config; None if one of the two was not timed."""
        given = self.timings[0].unit_s
        return given / timing.unit_s if given and timing.unit_s else None


def tune(config: Path, overrides: Sequence[str], *, minutes: float, out: Path | None, began: float) -> Tuned:
    """Time candidates of a training or of a cache build until `minutes` after `began`, on the monotonic clock.

    out: a new file for the config with the fastest settings.
    """
    if not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes is {minutes:g}; it must be above 0 and finite")
    until = began + minutes * 60
    _refuse_other_file(out)
    tree, kind, because = read_any(config, overrides)
    if kind is EvaluateJob:
        raise ConfigError(f"{config} is an evaluation ({because}); tune times a training or a cache build")
    job = validate(tree, kind, origin=str(config))
    preflight.refuse(preflight.examine(job))
    machine = hardware(job)
    where = f"{os.uname().nodename}, {processes(job)} x {machine.name}"
    err.print(f"timing on {where}: {minutes:g} min at most")
    begun = isinstance(job, TrainJob) and newest(job.out) is not None
    with told() as update, tempfile.TemporaryDirectory(prefix="flowmask-tune-") as scratch:
        search = Search(
            job,
            times=Trials(Path(scratch), update),
            changed=lambda changes: changed(job, tree, changes, begun=begun, origin=config),
            memory=Room(job, machine.memory_bytes),
            until=until,
            clock=time.monotonic,
        )
        search.run(axes_of(job, attention=machine.attention))
    if not search.fits:
        raise ConfigError(_why_nothing(search, minutes))
    best = search.best_timing
    unit = "step" if isinstance(job, TrainJob) else "clip"
    found = Tuned(unit, where, search.timings, best, with_changes(tree, best.changes), search.time_is_over)
    if out is not None:
        _write(found, config, out)
    return found


def changed(job: Job, tree: Tree, changes: Changes, *, begun: bool, origin: Path) -> Job | None:
    """The job of a config with changes; None if the config refuses them, or the run must not change them.

    begun: the run has a checkpoint, so settings that change rounding are kept.
    """
    # imports torch; an error in the config should be reported before
    from flowmask.trainer.state.resume import may_choose

    assert changes.keys() <= set(KEYS)
    if isinstance(job, TrainJob) and not all(may_choose(key, begun=begun) for key in changes):
        return None
    try:
        return validate(with_changes(tree, changes), type(job), origin=str(origin))
    except ConfigError:
        return None


def with_changes(tree: Tree, changes: Changes) -> Tree:
    """A config as in a file, with dotted keys set."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section] = {**(tree.get(section) or {}), name: value}
    return tree


def _why_nothing(search: Search, minutes: float) -> str:
    """Why no candidate was timed."""
    first, *rest = search.timings
    if search.time_is_over or not first.no_room:
        return f"no candidate was timed within --minutes {minutes:g}; give more (the given config: {first.said})"
    return f"none of {1 + len(rest)} settings fits this machine; `flowmask plan` shows the memory needs. {first.said}"


def _refuse_other_file(out: Path | None) -> None:
    """Raises ConfigError early for an --out that exists or is not writable."""
    if out is None:
        return
    if os.path.lexists(out):
        raise ConfigError(f"--out {out} already exists; remove it, or name another file")
    place = preflight.existing(out.parent)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"--out is {out}; {place} is not writable: name another file")


def _write(found: Tuned, config: Path, out: Path) -> None:
    """Write the complete config, which needs no other file; its first lines give the measurements."""
    speed_up = found.speed_up(found.best)
    gain = f", {speed_up:.2f} times the speed of the config as given" if found.best.changes and speed_up else ""
    head = (
        f"# {config}, as `flowmask tune` found it fastest of {len(found.timings)} settings on {found.where}\n"
        f"# {found.best.label}: {found.best.unit_s:.4g} s a {found.unit}{gain}\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, head + yaml.safe_dump(found.tree, sort_keys=False, allow_unicode=True))
