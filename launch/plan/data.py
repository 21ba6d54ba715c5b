"""The data of a training, if its caches exist: shapes of the clips, and length of the run.

Assumptions for missing caches go into `notes`.
"""

from contextlib import closing
from pathlib import Path

from flowmask.data_pipeline.cache.manifest import read_manifest
from flowmask.data_pipeline.config import ClipConfig
from flowmask.data_pipeline.read.mixture import MixturePlan
from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.one_pass import Shape
from flowmask.models.errors import CacheError
from flowmask.trainer.state.length import in_steps, opened, order


def length_of(job: TrainJob, notes: list[str]) -> tuple[TrainJob, list[float]]:
    """The job with its epochs as steps, and the number of epochs of each cache; empty if a cache is missing."""
    if (reader := opened(job)) is None:
        if job.train.epochs is not None:
            without = ", and the disk without its milestones" if job.checkpoint.milestone_every_steps else ""
            notes.append(f"the number of steps of {job.train.epochs} epochs is unknown without the cache{without}")
        return job, []
    with closing(reader):
        job, batches = in_steps(job, reader), order(job, reader)
    steps = job.train.last_step
    return job, batches.progress_of_each(steps) if isinstance(batches, MixturePlan) else [batches.progress(steps)]


def shapes_of(job: TrainJob, clip: Shape | None, notes: list[str]) -> dict[Shape, float]:
    """Clip shapes with their shares of the examples."""
    caches = [(str(entry.cache), entry.weight) for entry in job.data.mix] or [(str(job.data.cache), 1.0)]
    shares: dict[Shape, float] = {}
    whole = sum(weight for _, weight in caches)
    for cache, weight in caches:
        try:
            manifest = read_manifest(Path(cache))
        except CacheError:
            config = ClipConfig()
            shape = clip or Shape(config.frames, config.short_side, config.long_side)
            notes.append(f"{cache} does not exist: assuming clips of {shape}, see --clip")
            shares[shape] = shares.get(shape, 0) + weight / whole
            continue
        total = sum(sum(bucket.examples) for bucket in manifest.buckets)
        for bucket in manifest.buckets:
            shape = Shape(bucket.frames, bucket.height, bucket.width)
            shares[shape] = shares.get(shape, 0) + weight / whole * sum(bucket.examples) / total
    return shares
