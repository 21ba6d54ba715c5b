"""`flowmask tune`: reads the config, searches within the stated time, and writes the config with what was fastest."""

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
    """What was found.

    unit: what a time is of; where: the machine in words; timings: of every candidate, in order; tree: the config with
    the best one's changes; time_is_over: more could have been tried.
    """

    unit: str
    where: str
    timings: list[Timing]
    best: Timing
    tree: Tree
    time_is_over: bool

    def speed_up(self, timing: Timing) -> float | None:
        """How many times as fast as the config as given; None where one of them has no time."""
        given = self.timings[0].unit_s
        return given / timing.unit_s if given and timing.unit_s else None


def tune(config: Path, overrides: Sequence[str], *, minutes: float, out: Path | None, began: float) -> Tuned:
    """Time candidates of a training or of a cache build until `minutes` after `began`, on the monotonic clock.

    out: a new file for the config with what was fastest.
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
    """The job of a config with changes; None where the config refuses them, or the run may not have them.

    begun: the run has a checkpoint, so that it keeps whatever rounds otherwise.
    """
    from flowmask.trainer.state.resume import may_choose  # imports torch, which a mistake in a config need not

    assert changes.keys() <= set(KEYS)
    if isinstance(job, TrainJob) and not all(may_choose(key, begun=begun) for key in changes):
        return None
    try:
        return validate(with_changes(tree, changes), type(job), origin=str(origin))
    except ConfigError:
        return None


def with_changes(tree: Tree, changes: Changes) -> Tree:
    """A config as a file has it, with dotted keys set."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section] = {**(tree.get(section) or {}), name: value}
    return tree


def _why_nothing(search: Search, minutes: float) -> str:
    """Why not one candidate has a time."""
    first, *rest = search.timings
    if search.time_is_over or not first.no_room:
        return f"no candidate had a time within --minutes {minutes:g}; give more (as given: {first.said})"
    return f"none of {1 + len(rest)} settings fits this machine; `flowmask plan` says what they need. {first.said}"


def _refuse_other_file(out: Path | None) -> None:
    """ConfigError for an --out that is there, or can't be: now, and not when the time is spent."""
    if out is None:
        return
    if os.path.lexists(out):
        raise ConfigError(f"--out {out} is there; remove it, or name another file")
    place = preflight.existing(out.parent)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"--out is {out}; {place} can't be written: name another file")


def _write(found: Tuned, config: Path, out: Path) -> None:
    """The whole config, so that it needs no other file; at its head what was measured."""
    speed_up = found.speed_up(found.best)
    gain = f", {speed_up:.2f} times the speed of the config as given" if found.best.changes and speed_up else ""
    head = (
        f"# {config}, as `flowmask tune` found it fastest of {len(found.timings)} settings on {found.where}\n"
        f"# {found.best.label}: {found.best.unit_s:.4g} s a {found.unit}{gain}\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, head + yaml.safe_dump(found.tree, sort_keys=False, allow_unicode=True))
