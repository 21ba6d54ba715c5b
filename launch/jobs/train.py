"""`flowmask train` as a job."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.launch.jobs.job import Input, Job, Resolved, RunStatus, wan_inputs
from flowmask.models.files import read_object
from flowmask.models.folders import locks
from flowmask.models.folders.output_folder import Kind
from flowmask.models.safe.secrets import URI_VARIABLE, lacks, masked_uri, revealed_uri
from flowmask.models.stored.typed import is_number, read_yaml
from flowmask.trainer.config import RunConfig
from flowmask.trainer.objectives import objective_class
from flowmask.trainer.state.run_folder import CHECKPOINTS, CONFIG, METRICS, RUN, last_rows
from flowmask.trainer.state.steps import STATE, newest, step_of
from flowmask.trainer.track.meters import newest_window, summarise
from flowmask.trainer.train_config import TrainConfig, accumulation_steps

_ENCODERS = ("vae", "text_encoder", "tokenizer")  # these encode whole videos
_RATE_ROWS, _MOST_ROWS = 50, 50_000  # newest rows that the speed is computed from; limit of rows that are read


class TrainJob(Job, RunConfig):
    """`flowmask train`."""

    KIND, ROOM, COUNTS = "train", RunConfig, "step"
    COMMAND = "train"
    ALIASES = ("decoder",)
    LESS_MEMORY = "lower train.micro_batch, or choose settings that fit according to `flowmask plan`"
    SAVES = True

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        self.launch.refuse_array()
        accumulation_steps(self.train, self.launch.world_size)
        gpus, ranks = self.launch.gpus_per_node, self.launch.processes_per_node
        if gpus and ranks > gpus:
            raise ValueError(
                f"launch.processes_per_node is {ranks}, launch.gpus_per_node {gpus}; a training needs a "
                "GPU for each rank: set both to the same number"
            )
        return self

    @model_validator(mode="after")
    def _protocol_fits(self) -> Self:
        whole = self.evaluate.whole_videos
        if whole is not None and whole.protocol is not None:
            from flowmask.trainer.score.protocols import protocol_named

            protocol_named(whole.protocol).refuse_source(whole.data.source, name=whole.protocol)
        return self

    @property
    def attention_key(self) -> tuple[str, str]:
        return "train.attention", self.train.attention

    @property
    def reading_threads(self) -> int:
        return self.data.threads

    @property
    def makes(self) -> str:
        return objective_class(self.objective.kind).makes

    @property
    def trains(self) -> str:
        return self.makes

    def hidden(self) -> dict[str, str]:
        uri = self.tracking.uri if self.tracking.enabled else None
        if uri is None:
            return {}
        server = revealed_uri(uri)
        return {URI_VARIABLE: server} if lacks(masked_uri(uri)) else {}

    @property
    def scores(self) -> DataSourceConfig | None:
        whole = self.evaluate.whole_videos if self.evaluate.wanted else None
        return None if whole is None else whole.data

    def video_ids(self) -> set[tuple[str, str]]:
        """(family of datasets, video id) of the whole videos that validation scores; reads the dataset."""
        from flowmask.data_pipeline.plan.leaks import family_of
        from flowmask.data_pipeline.sources import open_source
        from flowmask.trainer.run.validate_whole_start import chosen

        whole = self.evaluate.whole_videos
        assert whole is not None
        videos = chosen(open_source(whole.data).videos(), whole.videos)
        return {(family_of(whole.data), video.video_id) for video in videos}

    def inputs(self) -> Iterator[Input]:
        parts = objective_class(self.objective.kind).wan_parts
        yield from wan_inputs(self.model.wan, (*parts, *(_ENCODERS if self.scores is not None else ())))
        if self.scores is not None:
            yield Input("evaluate.whole_videos.data.root", self.scores.root, "the folder of the dataset")
        if self.model.init is not None:
            yield Input("model.init", Path(self.model.init), "a run, an export, or a FlowRVS .pth")
        for cache in self.caches():
            yield Input("data.cache", cache / "manifest.json", "a cache that `flowmask cache build` finished")

    def caches(self) -> Sequence[Path]:
        return self.data.folders()

    def leaves(self) -> Sequence[str]:
        """Its last checkpoint, also by step number if the config determines it, and the best one if it is kept."""
        steps = self.train.steps
        names = ["latest", *([f"step_{steps:08d}"] if steps else []), *["best"] * self.evaluate.wanted]
        return [f"{CHECKPOINTS}/{name}" for name in names]

    def most_processes(self, limit: int) -> int:
        batches = self.train.global_batch // self.train.micro_batch
        return max(n for n in range(1, limit + 1) if batches % n == 0)

    def work(self, resolved: Resolved, *, rank: int, world: int) -> int:
        from flowmask.trainer.run.train import run

        return run(self)

    @classmethod
    def folder_kind(cls) -> Kind:
        return RUN

    @classmethod
    def recognised_by(cls, tree: Mapping[Any, Any]) -> str:
        return "it has the section train" if "train" in tree else ""

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return (folder / CHECKPOINTS).is_dir() or (folder / METRICS).is_file()

    @classmethod
    def status(cls, folder: Path) -> RunStatus:
        steps, every = _of_train(folder, "steps"), _of_train(folder, "log_every_steps")
        every = every or TrainConfig.model_fields["log_every_steps"].default
        rows = last_rows(folder / METRICS, min(max(_RATE_ROWS, 2 * every), _MOST_ROWS))
        ended = not locks.is_held(folder / cls.LOCK) or (bool(rows) and rows[-1]["step"] == steps)
        times = [row["time"] for row in rows[-_RATE_ROWS:] if is_number(row.get("time"))]
        took = [after - before for before, after in pairwise(times) if after > before]
        return RunStatus(
            str(folder),
            cls.KIND,
            "finished" if _finished(folder) else "idle",
            step=int(rows[-1]["step"]) if rows else 0,
            steps=steps,
            loss=summarise(newest_window(rows, every_steps=every, ended=ended)).get("loss"),
            step_s=statistics.median(took) if took else None,
        )


def _of_train(folder: Path, key: str) -> int | None:
    """An integer of the section train of a run's saved config."""
    try:
        value = read_yaml(folder / CONFIG)["train"][key]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return value if type(value) is int and 0 <= value < 1 << 53 else None


def _finished(folder: Path) -> bool:
    """Whether the last step is saved and at least one update was made."""
    steps, checkpoint = _of_train(folder, "steps"), newest(folder)
    if steps is None or checkpoint is None or step_of(checkpoint) < steps:
        return False
    return read_object(checkpoint / STATE).get("updates") != 0
