"""`flowmask cache build` as a job."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.config import CacheBuildConfig, source_names
from flowmask.launch.jobs.job import Input, Job, Progress, Resolved, save_config, wan_inputs
from flowmask.launch.progress import Update, cache_progress
from flowmask.models.errors import UserError


class CacheJob(Job, CacheBuildConfig):
    """`flowmask cache build`."""

    KIND, ROOM, COUNTS = "cache", CacheBuildConfig, "clip"
    LESS_MEMORY = "lower cache.batch_clips, or choose cache.encoder_dtype=bfloat16"
    INDEPENDENT, RESULT = True, "manifest.json"
    UNCHECKED = "encoder weights: the build itself hashes them and refuses an `out` of others"

    @property
    def computes_on(self) -> str:
        return self.cache.device

    @property
    def reading_threads(self) -> int:
        return self.cache.decode_threads

    def inputs(self) -> Iterator[Input]:
        yield from wan_inputs(self.model.wan, ("vae", "text_encoder", "tokenizer"))
        yield from (Input("data.root", source.root, "the folder of the dataset") for source in self.sources)

    def leaves(self) -> Sequence[str]:
        return (self.RESULT,)

    def video_ids(self) -> set[tuple[str, str]]:
        """(family of datasets, video id) of what the cache will hold; reads the dataset."""
        from flowmask.data_pipeline.plan.leaks import family_of, without_leaks
        from flowmask.data_pipeline.sources import open_source

        families = dict(zip(source_names(self.sources), map(family_of, self.sources), strict=True))
        videos = without_leaks(open_source(self.data), self).videos()
        return {(families[video.source], video.video_id) for video in videos if video.expressions}

    def work(self, resolved: Resolved, *, rank: int, world: int) -> None:
        from flowmask.data_pipeline.build.build import build

        with cache_progress(self.out, show=rank == 0) as on_progress:
            build(self.for_room(), worker=rank, workers=world, on_progress=on_progress)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # on every node: the first one may have died
            save_config(self.out, resolved)

    @classmethod
    def recognised_by(cls, tree: Mapping[Any, Any]) -> str:
        data = tree.get("data")
        if "model" in tree and (isinstance(data, list) or (isinstance(data, dict) and "root" in data)):
            return "it has a dataset and encoders, and nothing to train or to score"
        return ""

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return (folder / "plan" / "plan.json").is_file() or (folder / "work" / "claims").is_dir()

    @classmethod
    def progress(cls, folder: Path) -> Progress:
        from flowmask.data_pipeline.build.status import status

        try:
            found = status(folder)
        except UserError:
            return Progress()
        rate = found.rate_per_s if found.phase == "clips" else None
        return Progress(
            done=found.clips.done if found.clips else None,
            total=found.clips.total if found.clips else None,
            seconds_each=1 / rate if rate else None,
            finished=found.phase == "complete",
            running=bool(found.workers_alive),
            phase=found.phase,
        )

    @classmethod
    def show_progress(cls, folder: Path, update: Update) -> None:
        from flowmask.data_pipeline.build.status import status

        try:
            found = status(folder)
        except UserError:
            return  # nobody has begun
        for what, part in (("sentences", found.sentences), ("clips", found.clips)):
            if part is not None:
                update(what, part.done, part.total)
