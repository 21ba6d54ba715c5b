"""`flowmask cache build` as a job."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmask.data_pipeline.config import CacheBuildConfig, source_names
from flowmask.launch.console import err
from flowmask.launch.jobs.job import Input, Job, Resolved, RunStatus, save_config, wan_inputs
from flowmask.launch.progress import Update, cache_progress
from flowmask.models.errors import UserError
from flowmask.models.folders.output_folder import Kind

if TYPE_CHECKING:
    from flowmask.data_pipeline.build.status import CacheStatus


class CacheJob(Job, CacheBuildConfig):
    """`flowmask cache build`."""

    KIND, ROOM, COUNTS = "cache", CacheBuildConfig, "clip"
    COMMAND = "cache build"
    LESS_MEMORY = "lower cache.batch_clips, or choose cache.encoder_dtype=bfloat16"
    INDEPENDENT, RESULT = True, "manifest.json"
    UNCHECKED = "encoder weights: the build hashes them, and refuses an `out` that was made with other weights"

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
        """(family of datasets, video id) of the cache's videos; reads the dataset."""
        from flowmask.data_pipeline.plan.leaks import family_of, without_leaks
        from flowmask.data_pipeline.sources import open_source

        families = dict(zip(source_names(self.sources), map(family_of, self.sources), strict=True))
        videos = without_leaks(open_source(self.data), self).videos()
        return {(families[video.source], video.video_id) for video in videos if video.expressions}

    def work(self, resolved: Resolved, *, rank: int, world: int) -> None:
        from flowmask.data_pipeline.build.build import build
        from flowmask.data_pipeline.cache.quarantine import FILE, summary

        with cache_progress(self.out, show=rank == 0) as on_progress:
            build(self.for_room(), worker=rank, workers=world, on_progress=on_progress)
        if rank == 0 and (lost := summary(self.out)):
            err.print(f"{self.out}: {lost}; the list: {self.out / FILE}")
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # on every node, because the first one may have died
            save_config(self.out, resolved)

    @classmethod
    def folder_kind(cls) -> Kind:
        from flowmask.data_pipeline.plan.units import CACHE

        return CACHE

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
    def status(cls, folder: Path) -> RunStatus:
        unknown = RunStatus(str(folder), cls.KIND)
        if (found := cls._build_status(folder)) is None:
            return unknown
        done, clips = found.phase == "complete", found.clips
        rate = found.rate_per_s if found.phase == "clips" else None
        return replace(
            unknown,
            state="finished" if done else "running" if found.workers_alive else "idle",
            why="" if done else found.phase,
            step=clips.done if clips else None,
            steps=clips.total if clips else None,
            step_s=1 / rate if rate else None,
        )

    @classmethod
    def show_progress(cls, folder: Path, update: Update) -> None:
        found = cls._build_status(folder)
        for what, part in (("sentences", found.sentences), ("clips", found.clips)) if found else ():
            if part is not None:
                update(what, part.done, part.total)

    @staticmethod
    def _build_status(folder: Path) -> "CacheStatus | None":
        """None if no build has begun."""
        from flowmask.data_pipeline.build.status import status

        try:
            return status(folder)
        except UserError:
            return None
