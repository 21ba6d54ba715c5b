"""The search alone: made-up times and memory of jobs, and a clock that moves only when a job is timed."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from trials import SEED, TRIALS

from flowmask.launch.jobs import CacheJob, TrainJob
from flowmask.launch.jobs.job import Job
from flowmask.launch.tune import axes
from flowmask.launch.tune.axes import KEYS, axes_of
from flowmask.launch.tune.search import GAIN, Changes, Search, Timing, value_of
from flowmask.launch.tune.tune import changed, with_changes
from flowmask.models.errors import CheckpointError
from flowmask.trainer.state.resume import may_choose, refuse_other_config, settled

DRAWS = 30 * TRIALS

TREE: dict[str, Any] = {
    "out": "run",
    "model": {"wan": "wan"},
    "data": {"cache": "cache"},
    "train": {"steps": 10, "global_batch": 8},
    "launch": {"processes_per_node": 2},
}
CACHE: dict[str, Any] = {"out": "cache", "model": {"wan": "wan"}, "data": {"root": "dataset"}}
KERNELS = ("native", "cudnn", "flash")
VALUES: dict[str, tuple[Any, ...]] = {
    axes.MICRO_BATCH: (1, 2, 4),
    axes.RECOMPUTATION: ("none", "selective", "full"),
    axes.STAGE: (0, 1, 2),
    axes.ATTENTION: KERNELS,
    axes.COMPILE: (False, True),
}


@dataclass
class Bench:
    """A simulated machine: time and memory of a job are products, and each trial moves the clock."""

    seconds: Callable[[Job], float]
    room: float = math.inf  # memory; jobs need `needs`
    needs: Callable[[Job], float] = lambda job: 1.0
    foreseen: bool = True  # whether `plan` knows the memory limit
    trial_s: float = 10.0
    waits: float = 0.0
    now: float = 0.0
    limit: float = field(init=False)
    tried: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limit = self.room if self.foreseen else math.inf

    def refuses(self, job: Job) -> str:
        return "" if self.needs(job) <= self.limit else "too large"

    def is_too_small_for(self, job: Job) -> None:
        self.limit = min(self.limit, math.nextafter(self.needs(job), 0))

    def __call__(self, job: Job, changes: Changes, *, until: float, best: Timing) -> Timing:
        self.tried.append(job)
        self.now += min(self.trial_s, until - self.now)
        if self.needs(job) > self.room:
            return Timing(changes, said="does not fit", no_room=True)
        return Timing(changes, self.seconds(job), waits=self.waits)


def search(
    bench: Bench,
    tree: Mapping[str, Any] = TREE,
    *,
    kind: type[Job] = TrainJob,
    minutes: float = 60,
    begun: bool = False,
) -> Search:
    """A whole search; begun: the run already has a checkpoint."""
    given = kind.model_validate(tree)
    found = Search(
        given,
        times=bench,
        changed=lambda changes: changed(given, dict(tree), changes, begun=begun, origin=Path("config.yaml")),
        memory=bench,
        until=60 * minutes,
        clock=lambda: bench.now,
    )
    found.run(axes_of(given, attention=KERNELS))
    return found


def tree_with(**changes: Any) -> dict[str, Any]:
    return with_changes(TREE, {key.replace("__", "."): value for key, value in changes.items()})


def test_the_fastest_of_the_settings_is_found_wherever_one_starts_if_each_has_its_own_share_of_the_time() -> None:
    rng = random.Random(SEED)
    for _ in range(DRAWS):
        # a larger batch is always better or always worse; more recomputation is never faster
        slope = rng.choice((0.7, 1.4))
        share = {
            axes.MICRO_BATCH: {n: slope**i for i, n in enumerate((1, 2, 4))},
            axes.RECOMPUTATION: {"none": 1.0, "selective": rng.uniform(1.1, 1.3), "full": rng.uniform(1.4, 2)},
            **{key: {v: rng.choice((1, 1.2, 1.5)) for v in VALUES[key]} for key in (axes.STAGE, axes.ATTENTION)},
            axes.COMPILE: {False: rng.choice((1, 1.3)), True: 1.15},
        }

        def seconds(job: Job, share: Any = share) -> float:
            return math.prod(table.get(value_of(job, key), 2.0) for key, table in share.items())

        start = {key: rng.choice(values) for key, values in VALUES.items()}
        found = search(Bench(seconds), with_changes(TREE, start))
        best = math.prod(min(table.values()) for table in share.values())
        assert found.best_s <= best / GAIN ** len(share), (start, found.best_timing)


@pytest.mark.parametrize("minutes", [0.5, 1, 1.5])
def test_the_time_is_kept_and_nothing_begins_that_could_not_end(minutes: float) -> None:
    bench = Bench(lambda job: 1.0, trial_s=14.0)
    found = search(bench, minutes=minutes)
    assert bench.now <= 60 * minutes and found.time_is_over
    assert len(found.timings) == 60 * minutes // 14, "as many as there is time for, and not one begins that has none"


def test_a_job_that_takes_all_of_the_time_is_ended_at_the_deadline() -> None:
    bench = Bench(lambda job: 1.0, trial_s=math.inf)
    found = search(bench, minutes=3)
    assert bench.now == 180 and found.time_is_over and len(found.timings) == 1


def bytes_of(job: Job) -> float:
    assert isinstance(job, TrainJob)
    kept = {"none": 4.0, "selective": 2.0, "full": 1.0}[job.train.activation_checkpointing]
    states = 0.0 if job.train.offload_optimizer else 8.0 / (1 + job.train.zero_stage)
    return states + job.train.micro_batch * kept


@pytest.mark.parametrize("foreseen", [True, False])
def test_what_does_not_fit_is_never_chosen_and_what_needs_as_much_is_not_tried(foreseen: bool) -> None:
    def quick(job: Job) -> float:  # without a limit, the largest job would win
        return 1 / bytes_of(job)

    bench = Bench(quick, room=10.0, needs=bytes_of, foreseen=foreseen)
    found = search(bench, tree_with(train__activation_checkpointing="full"))
    assert found.fits and bytes_of(found.best) <= 10
    failed = [bytes_of(job) for job in bench.tried if bytes_of(job) > 10]
    assert failed == sorted(failed, reverse=True) and len(set(failed)) == len(failed)
    assert not foreseen or not failed


def test_a_job_that_does_not_fit_is_made_to_by_the_first_setting_that_does() -> None:
    bench = Bench(bytes_of, room=2.5, needs=bytes_of)
    found = search(bench, tree_with(train__micro_batch=4, train__zero_stage=1))
    assert found.timings[0].no_room and found.fits and bytes_of(found.best) <= 2.5
    hopeless = search(Bench(bytes_of, room=0.5, needs=bytes_of), TREE)
    assert not hopeless.fits and hopeless.best_timing.said


@pytest.mark.parametrize("begun", [False, True])
def test_no_candidate_learns_anything_else(begun: bool) -> None:
    """By the rules of a resume. Kernels and compilation round differently, and change only where no run has begun."""
    rng, otherwise, tried = random.Random(SEED), 0, 0
    for _ in range(max(3, DRAWS // 10)):
        start = with_changes(TREE, {key: rng.choice(values) for key, values in VALUES.items()})
        bench = Bench(lambda job: rng.uniform(0.5, 1), waits=0.5)
        search(bench, start, begun=begun)
        given, *others = bench.tried
        assert isinstance(given, TrainJob)
        state = {"config": settled(given, {}).model_dump(mode="json")}
        back = {key: value_of(given, key) for key in KEYS if not key.startswith("cache.")}
        tried += len(others)
        for job in others:
            assert isinstance(job, TrainJob)
            assert TrainJob.model_validate(with_changes(job.model_dump(mode="json"), back)) == given, "only KEYS"
            try:
                refuse_other_config(job, state)
            except CheckpointError:
                otherwise += 1
                same = {"attention": given.train.attention, "compile": given.train.compile}
                refuse_other_config(job.model_copy(update={"train": job.train.model_copy(update=same)}), state)
    assert tried > 10 and bool(otherwise) != begun


def test_every_key_that_is_tried_of_a_training_is_one_that_its_run_may_choose() -> None:
    keys = [key for key in KEYS if key != axes.DECODE]
    assert all(may_choose(key, begun=False) for key in keys)
    assert [key for key in keys if not may_choose(key, begun=True)] == [axes.ATTENTION, axes.COMPILE]


def test_the_threads_of_a_build_are_raised_and_lowered_as_long_as_it_helps() -> None:
    for best in (1, 2, 4, 8, 16):
        bench = Bench(lambda job, best=best: 1 + abs(math.log2(value_of(job, axes.DECODE) / best)))  # type: ignore[misc]
        found = search(bench, CACHE, kind=CacheJob)
        assert value_of(found.best, axes.DECODE) == best


def test_readers_are_only_added_where_steps_wait_for_data() -> None:
    def reads(found: Search) -> bool:
        return any(timing.changes.keys() & {axes.THREADS, axes.AHEAD} for timing in found.timings)

    assert reads(search(Bench(lambda job: 1.0, waits=0.3))) and not reads(search(Bench(lambda job: 1.0, waits=0.01)))
