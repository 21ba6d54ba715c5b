"""`flowmask evaluate` as a job."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.launch.console import err
from flowmask.launch.jobs.job import Input, Job, Resolved, RunStatus, save_config
from flowmask.launch.progress import bar, show_scores
from flowmask.models.files import read_object
from flowmask.models.folders.output_folder import Kind
from flowmask.trainer.score.evaluate_config import EvaluateConfig


class EvaluateJob(Job, EvaluateConfig):
    """`flowmask evaluate`."""

    KIND, ROOM, COUNTS = "evaluate", EvaluateConfig, "video"
    COMMAND = "evaluate"
    LOCK = ".evaluate/rank_0.lock"
    LESS_MEMORY = "lower the box or sentences_per_batch, or choose bf16 as precision, encoder_ and decoder_precision"

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        self.launch.refuse_array()
        return self

    @property
    def computes_on(self) -> str:
        return self.device

    @property
    def attention_key(self) -> tuple[str, str]:
        return "attention", self.attention

    @property
    def scores(self) -> DataSourceConfig | None:
        return self.data

    def inputs(self) -> Iterator[Input]:
        yield Input("checkpoint", Path(self.checkpoint), "a run, an export, or a FlowRVS .pth")
        yield Input("data.root", self.data.root, "the folder of the dataset")
        if self.presence not in (None, "none"):
            yield Input("presence", Path(self.presence), "a calibrated evaluation")
        if self.calibrate.enabled and self.calibrate.data is not None:
            yield Input("calibrate.data.root", self.calibrate.data.root, "the folder of the dataset")

    def video_ids(self) -> set[tuple[str, str]]:
        """(family of datasets, video id) of the videos to score; reads the dataset."""
        from flowmask.data_pipeline.plan.leaks import family_of
        from flowmask.data_pipeline.sources import open_source

        videos = list(open_source(self.data).videos())[: self.max_videos]
        return {(family_of(self.data), video.video_id) for video in videos if video.expressions}

    def work(self, resolved: Resolved, *, rank: int, world: int) -> None:
        from flowmask.trainer.score.evaluate import evaluate
        from flowmask.trainer.track.tracking import send_left

        with bar(show=rank == 0) as on_progress:
            config = self.for_room()
            say: Callable[[str], None] = err.print if rank == 0 else lambda line: None

            def also(folder: Path) -> None:
                save_config(folder, resolved)

            scores = evaluate(config, rank=rank, world=world, on_progress=on_progress, say=say, also=also)
        if scores is not None:  # the last rank to finish has them
            show_scores(scores, self.out, archive=self.archive is not None)
            send_left(self.checkpoint, say=err.print)

    @classmethod
    def folder_kind(cls) -> Kind:
        from flowmask.trainer.score.store import EVALUATION

        return EVALUATION

    @classmethod
    def recognised_by(cls, tree: Mapping[Any, Any]) -> str:
        return "it names a checkpoint to score" if isinstance(tree.get("checkpoint"), str) else ""

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return (folder / "scores.json").is_file() or (folder / ".evaluate").is_dir()

    @classmethod
    def status(cls, folder: Path) -> RunStatus:
        records = sum(1 for _ in folder.glob(".evaluate/*/records/*.json"))
        scores = read_object(folder / "scores.json")
        if scores and not records:
            videos = count if type(count := scores.get("videos")) is int else None
            return RunStatus(str(folder), cls.KIND, "finished", step=videos, steps=videos)
        return RunStatus(str(folder), cls.KIND, step=records)
