"""Times a cache build on a sample: decodes and encodes the same few clips repeatedly, without the rest of the build.

Makes no plan, encodes no sentences and stores nothing. The files are soon in the page cache.
"""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count, islice
from pathlib import Path

from flowmask.data_pipeline.build.build import Build
from flowmask.data_pipeline.build.encode import EncodedClip
from flowmask.data_pipeline.build.pipeline import Pipeline, PipelineStages, UnitInHand
from flowmask.data_pipeline.clip.clips import Clip, clips_of
from flowmask.data_pipeline.clip.decode import DecodedClip, decode
from flowmask.launch.jobs import CacheJob
from flowmask.launch.jobs.job import Resolved
from flowmask.models.errors import DataError

_BATCHES, _LEAST = 2, 8  # size of the sample: batches, and the least number of clips


def keep_encoding(resolved: Resolved, rows: Path, *, worker: int) -> None:
    """Work until this process is ended; write a row after each pass over the sample.

    worker: its number on this machine; each worker starts at another part of the dataset. Raises DataError if the
    dataset has no readable clip with a mask.
    """
    job = CacheJob.model_validate(resolved)
    build, workers = Build(job.for_room()), job.launch.processes_per_node
    clips = list(islice(_readable(build, share=worker / workers), max(_LEAST, _BATCHES * job.cache.batch_clips)))
    if not clips:
        raise DataError(f"{job.sources[0].root}: no clip with a sentence and a mask can be read; check data.split")
    with rows.open("ab", buffering=0) as file:
        started = [time.perf_counter()]

        def write(unit: UnitInHand[Clip], encoded: Iterator[EncodedClip]) -> None:
            for _ in encoded:
                pass
            now = time.perf_counter()
            row = {"step": unit.number + 1, "step_s": (now - started[0]) / len(clips)}
            started[0] = now
            file.write(json.dumps(row).encode() + b"\n")

        stages: PipelineStages[Clip, DecodedClip, EncodedClip] = PipelineStages(
            items=lambda unit: clips,
            decode=lambda clip: _decoded(build, clip),
            encode=lambda unit, decoded: build.encoder.encode(decoded),
            write=write,
        )
        threads = job.cache.decode_threads
        pipeline = Pipeline(stages, decode_threads=threads, ahead=job.cache.batch_clips + threads)
        pipeline.run((unit, ExitStack()) for unit in count())


def _readable(build: Build, *, share: float) -> Iterator[Clip]:
    """Clips of the first view that have a mask, starting at a position in the dataset."""
    config, videos = build.config, build.source.videos()
    first = int(share * len(videos))
    for index in (*range(first, len(videos)), *range(first)):
        video = videos[index]
        cut = config.clip_of(video.source)
        try:
            for clip in clips_of(video, index=index, first_number=0, view=0, clip=cut, cache=config.cache):
                if _decoded(build, clip).masks:
                    yield clip
        except DataError:
            continue


def _decoded(build: Build, clip: Clip) -> DecodedClip:
    return decode(clip, build.source.videos()[clip.video], drop_empty_masks=build.config.cache.drop_empty_masks)
