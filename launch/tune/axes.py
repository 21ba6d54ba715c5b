"""The settings to try for each kind of job: they change its speed, but not its results.

An axis reads the fastest job so far and offers changes, one at a time: the next after the previous was timed.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import product, takewhile
from typing import Any, cast, get_args

from flowmask.launch.jobs import CacheJob, TrainJob
from flowmask.launch.jobs.job import Job
from flowmask.launch.tune.search import Axis, Changes, Search
from flowmask.models.config import Recompute

MICRO_BATCH, RECOMPUTATION = "train.micro_batch", "train.activation_checkpointing"
STAGE, OFFLOAD = "train.zero_stage", "train.offload_optimizer"
ATTENTION, COMPILE = "train.attention", "train.compile"
THREADS, AHEAD = "data.threads", "data.prefetch_batches"
DECODE = "cache.decode_threads"
KEYS = (MICRO_BATCH, RECOMPUTATION, STAGE, OFFLOAD, ATTENTION, COMPILE, THREADS, AHEAD, DECODE)
RECOMPUTE = get_args(Recompute)  # from the least work to the most
_MOST_THREADS, _MOST_AHEAD = 16, 16
_WAITS = 0.02  # if steps wait for data less than this share, faster loading does not help


def axes_of(job: Job, *, attention: Sequence[str]) -> list[Axis]:
    """The axes, usually most effective first. attention: the kernels that this machine supports."""
    if isinstance(job, CacheJob):
        return [_decoding]

    def kernels(search: Search) -> Iterator[Changes]:
        yield from ({ATTENTION: name} for name in attention)

    return [_fitting, _recomputation, _batch, kernels, _sharding, _compilation, _reading]


def _fitting(search: Search) -> Iterator[Changes]:
    """If the given job does not fit: the first setting that fits; optimizer offload is tried last."""
    train = _train(search)
    smaller = [number for number in reversed(_micro_batches(search)) if number <= train.micro_batch]
    stages = sorted(range(4), key=lambda stage: stage != train.zero_stage)  # the job's own stage first
    settings = product((train.offload_optimizer, True), stages, RECOMPUTE, smaller)
    for offload, stage, kind, micro in settings:
        if search.fits:
            return
        yield {OFFLOAD: offload, STAGE: stage, RECOMPUTATION: kind, MICRO_BATCH: micro}


def _recomputation(search: Search) -> Iterator[Changes]:
    """Less recomputation; the least that fits is the fastest."""
    for kind in RECOMPUTE[: RECOMPUTE.index(_train(search).activation_checkpointing)]:
        before = search.best_timing
        yield {RECOMPUTATION: kind}
        if search.best_timing is not before:
            return


def _batch(search: Search) -> Iterator[Changes]:
    """Larger micro-batches of the same global batch, then smaller ones, each as long as it is faster.

    A larger one may need more recomputation; it is offered with the least that fits.
    """
    now, possible, given = _train(search).micro_batch, _micro_batches(search), search.best_timing
    larger, smaller = [n for n in possible if n > now], [n for n in reversed(possible) if n < now]
    for way in (larger, smaller):
        for micro in way:
            before = search.best_timing
            for kind in RECOMPUTE[RECOMPUTE.index(_train(search).activation_checkpointing) :]:
                yield {MICRO_BATCH: micro, RECOMPUTATION: kind}
                if search.last is not None and not search.last.no_room:
                    break
            if search.best_timing is before:
                break
        if search.best_timing is not given:
            return


def _micro_batches(search: Search) -> list[int]:
    """Micro-batch sizes that divide the global batch over the job's number of processes."""
    train, ranks = _train(search), cast(TrainJob, search.best).launch.world_size
    share = train.global_batch * train.sequence_parallel // ranks
    return [number for number in range(1, share + 1) if share % number == 0]


def _sharding(search: Search) -> Iterator[Changes]:
    """No optimizer offload; with several ranks also other ZeRO stages."""
    if _train(search).offload_optimizer:
        yield {OFFLOAD: False}
    if cast(TrainJob, search.best).launch.processes_per_node > 1:
        yield from ({STAGE: stage} for stage in range(4))


def _compilation(search: Search) -> Iterator[Changes]:
    yield {COMPILE: not _train(search).compile}


def _reading(search: Search) -> Iterator[Changes]:
    """More threads, then more batches ahead, if steps wait for data."""
    data = cast(TrainJob, search.best).data
    yield from _while_it_helps(search, THREADS, _doubled(data.threads, most=_MOST_THREADS))
    if data.mode == "indexed":
        yield from _while_it_helps(search, AHEAD, _doubled(data.prefetch_batches, most=_MOST_AHEAD))


def _while_it_helps(search: Search, key: str, values: Sequence[Any]) -> Iterator[Changes]:
    for value in values:
        before = search.best_timing
        if before.waits < _WAITS:
            return
        yield {key: value}
        if search.best_timing is before:
            return


def _decoding(search: Search) -> Iterator[Changes]:
    """More threads that read and resize as long as it is faster, then fewer."""
    now = cast(CacheJob, search.best).cache.decode_threads
    most = max(_MOST_THREADS, len(os.sched_getaffinity(0)))
    smaller = [number for number in (now // 2, now // 4) if number]
    for way in (_doubled(now, most=most), smaller):
        for threads in way:
            before = search.best_timing
            yield {DECODE: threads}
            if search.best_timing is before:
                break


def _doubled(now: int, *, most: int) -> list[int]:
    """`now` doubled repeatedly, up to `most`."""
    return list(takewhile(lambda number: number <= most, (max(1, now * 2) * 2**k for k in range(10))))


def _train(search: Search) -> Any:
    return cast(TrainJob, search.best).train
