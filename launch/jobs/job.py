"""The interface of a kind of job, so that no other code in this room depends on the kind."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.launch.launch_config import LaunchConfig
from flowmask.launch.progress import Update
from flowmask.models.config import Section
from flowmask.models.files import write_atomically
from flowmask.models.folders.output_folder import Kind as OutputKind

Resolved = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """A path that a job reads: its config key, the path, and a description of the expected file or folder."""

    key: str
    path: Path
    what: str


State = Literal["running", "queued", "requeued", "finished", "failed", "stopped", "idle", "unknown"]


@dataclass(frozen=True)
class RunStatus:
    """State of a run now. Steps are counted in `Job.COUNTS`; step_s: recent seconds per step; why: the reason."""

    folder: str
    kind: str
    state: State = "idle"
    why: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    step_s: float | None = None
    eta_s: float | None = None
    restarts: int = 0
    job_id: str | None = None
    logs: str = ""


class Job(Section):
    """The config of a room plus `launch`. A job is plain data, equal on every machine."""

    KIND: ClassVar[str]
    COMMAND: ClassVar[str]  # subcommand of `flowmask` that runs it
    ROOM: ClassVar[type[Section]]  # config class of the room that does the work
    ALIASES: ClassVar[tuple[str, ...]] = ()  # other names of the kind in a config
    COUNTS: ClassVar[str]  # unit of its progress
    LESS_MEMORY: ClassVar[str]  # the fix if the GPU has too little memory
    INDEPENDENT: ClassVar[bool] = False  # its ranks take over the work of a lost one
    SAVES: ClassVar[bool] = False  # writes checkpoints, from which the next start continues
    LOCK: ClassVar[str] = ".lock"  # lock file in `out`, held by the working process
    RESULT: ClassVar[str] = ""  # file in `out` whose presence means done, however its ranks ended
    UNCHECKED: ClassVar[str] = ""  # facts that only the job itself can check

    if TYPE_CHECKING:
        out: Path  # in the config of every room
    launch: LaunchConfig = LaunchConfig()

    @property
    def computes_on(self) -> str:
        """auto, cpu or cuda."""
        return "auto"

    @property
    def attention_key(self) -> tuple[str, str]:
        """The key that chooses the attention kernel, and its value."""
        return "", "native"

    @property
    def reading_threads(self) -> int:
        """Number of threads of a process that read data while it computes."""
        return 0

    @property
    def makes(self) -> str:
        """The result in `out`: the part that it trains, else its kind."""
        return self.KIND

    @property
    def scores(self) -> DataSourceConfig | None:
        """The dataset of the videos that it scores; no training may use one of these videos."""
        return None

    def video_ids(self) -> set[tuple[str, str]]:
        """(family of datasets, video id) of the videos that it scores or caches; reads the dataset."""
        return set()

    @property
    def trains(self) -> str | None:
        """The part of weights that a training trains: "dit" or "mask_decoder"."""
        return None

    def hidden(self) -> dict[str, str]:
        """Environment variables with the values that a saved config lacks. ConfigError if this is a saved config."""
        return {}

    def inputs(self) -> Iterator[Input]:
        """Every path that must exist before it starts."""
        raise NotImplementedError

    def caches(self) -> Sequence[Path]:
        """The caches that it reads from folders (not from object stores)."""
        return ()

    def leaves(self) -> Sequence[str]:
        """Names below `out` that other jobs may read once this one has succeeded."""
        return ()

    def will_make(self, path: Path) -> bool:
        """Whether a missing path will exist once this job has succeeded."""
        out = self.out.resolve()
        return path.resolve() in (out, *(out / name for name in self.leaves()))

    def most_processes(self, limit: int) -> int:
        """The largest number of processes, at most `limit`, that share the work evenly."""
        return limit

    def work(self, resolved: Resolved, *, rank: int, world: int) -> int | None:
        """Do one rank's part in this process; returns an exit code, None for 0. resolved: the config to save."""
        raise NotImplementedError

    def for_room(self) -> Any:
        """The config without `launch`, for the room that does the work."""
        return self.ROOM.model_validate(self.model_dump(exclude={"launch"}))

    @classmethod
    def folder_kind(cls) -> OutputKind:
        """The kind with which its `out` is marked."""
        raise NotImplementedError

    @classmethod
    def recognised_by(cls, tree: Mapping[Any, Any]) -> str:
        """Why a config without `kind` has this kind; empty if it has not."""
        raise NotImplementedError

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether a folder is the `out` of a job of this kind that has started."""
        raise NotImplementedError

    @classmethod
    def status(cls, folder: Path) -> RunStatus:
        """Progress of the job in a folder by its own files; state "idle" if they do not determine it."""
        raise NotImplementedError

    @classmethod
    def show_progress(cls, folder: Path, update: Update) -> None:
        """Update a bar with the progress of a job that runs elsewhere, if its files show it."""


def wan_inputs(wan: Path, parts: Sequence[str]) -> Iterator[Input]:
    """The inputs for a Wan folder: the folder and the parts that are loaded."""
    yield Input("model.wan", wan, "the Wan2.1 folder in the diffusers layout")
    if wan.is_dir():
        yield from (Input("model.wan", wan / part, f"Wan2.1's {part}") for part in parts)


def save_config(folder: Path, resolved: Resolved) -> None:
    """Write `folder/config.yaml`, from which the same command repeats the job."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
