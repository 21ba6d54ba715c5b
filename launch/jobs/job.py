"""What each kind of job says of itself, so that nothing else in this room has to ask which kind it is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.launch.config import LaunchConfig
from flowmask.launch.progress import Update
from flowmask.models.config import Section
from flowmask.models.files import write_atomically
from flowmask.models.folders.output_folder import Kind as OutputKind

Resolved = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """A path that a job reads: the key that names it, and what must be there."""

    key: str
    path: Path
    what: str


State = Literal["running", "queued", "requeued", "finished", "failed", "stopped", "idle", "unknown"]


@dataclass(frozen=True)
class RunStatus:
    """A run at this moment. Steps are those of `Job.COUNTS`; step_s: seconds of one, of late; why: of the state."""

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
    """A room's config together with `launch`. A job is plain data: it means the same on every machine."""

    KIND: ClassVar[str]
    COMMAND: ClassVar[str]  # of `flowmask`, that runs it
    ROOM: ClassVar[type[Section]]  # the config of the room that does the work
    ALIASES: ClassVar[tuple[str, ...]] = ()  # other names of the kind in a config
    COUNTS: ClassVar[str]  # what its progress counts
    LESS_MEMORY: ClassVar[str]  # what to do where the GPU is too small
    INDEPENDENT: ClassVar[bool] = False  # its ranks take over what a lost one leaves
    SAVES: ClassVar[bool] = False  # leaves checkpoints, from which the next start goes on
    LOCK: ClassVar[str] = ".lock"  # held in `out` by who works there
    RESULT: ClassVar[str] = ""  # the file in `out` that tells that it is done, however its ranks ended
    UNCHECKED: ClassVar[str] = ""  # what only the job itself can check

    if TYPE_CHECKING:
        out: Path  # of every room's config
    launch: LaunchConfig = LaunchConfig()

    @property
    def computes_on(self) -> str:
        """auto, cpu or cuda."""
        return "auto"

    @property
    def attention_key(self) -> tuple[str, str]:
        """The key that says who computes attention, and its value."""
        return "", "native"

    @property
    def reading_threads(self) -> int:
        """Threads of a process that read while it computes."""
        return 0

    @property
    def makes(self) -> str:
        """What the job leaves in `out`: the part that it trains, else its kind."""
        return self.KIND

    @property
    def scores(self) -> DataSourceConfig | None:
        """The dataset of the videos that it scores: no training may have one of them."""
        return None

    def video_ids(self) -> set[tuple[str, str]]:
        """(family of datasets, video id) of what it scores, or caches; reads the dataset."""
        return set()

    @property
    def trains(self) -> str | None:
        """The part of weights that a training trains: "dit" or "mask_decoder"."""
        return None

    def hidden(self) -> dict[str, str]:
        """Variables for its processes, of what a saved copy of it lacks; ConfigError where it is such a copy itself."""
        return {}

    def inputs(self) -> Iterator[Input]:
        """Every path that must be there before it starts."""
        raise NotImplementedError

    def caches(self) -> Sequence[Path]:
        """The caches that it reads and that are folders."""
        return ()

    def leaves(self) -> Sequence[str]:
        """What other jobs may read below `out` once this one has ended well."""
        return ()

    def will_make(self, path: Path) -> bool:
        """Whether a path that is not there will be, once this job has ended well."""
        out = self.out.resolve()
        return path.resolve() in (out, *(out / name for name in self.leaves()))

    def most_processes(self, limit: int) -> int:
        """The largest number of processes, at most `limit`, that share the work evenly."""
        return limit

    def work(self, resolved: Resolved, *, rank: int, world: int) -> int | None:
        """Do one rank's part in this process; an exit code, None for 0. resolved: what is saved beside the result."""
        raise NotImplementedError

    def for_room(self) -> Any:
        """The config without `launch`, as the room that does the work knows it."""
        return self.ROOM.model_validate(self.model_dump(exclude={"launch"}))

    @classmethod
    def folder_kind(cls) -> OutputKind:
        """What its `out` is marked as."""
        raise NotImplementedError

    @classmethod
    def recognised_by(cls, tree: Mapping[Any, Any]) -> str:
        """Why a config that does not say its kind is of this one; empty if it is not."""
        raise NotImplementedError

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether a folder is the `out` of a job of this kind that has begun."""
        raise NotImplementedError

    @classmethod
    def status(cls, folder: Path) -> RunStatus:
        """How far the job in a folder is by its own files; "idle" if these do not tell its state."""
        raise NotImplementedError

    @classmethod
    def show_progress(cls, folder: Path, update: Update) -> None:
        """Tell a bar how far the job in a folder is, where that is known while it runs elsewhere."""


def wan_inputs(wan: Path, parts: Sequence[str]) -> Iterator[Input]:
    """A Wan folder and the parts of it that are loaded."""
    yield Input("model.wan", wan, "the Wan2.1 folder in the diffusers layout")
    if wan.is_dir():
        yield from (Input("model.wan", wan / part, f"Wan2.1's {part}") for part in parts)


def save_config(folder: Path, resolved: Resolved) -> None:
    """Write `folder/config.yaml`, with which the same command repeats the job."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
