"""One submission of a job to a cluster, as files on the shared filesystem: OUT/launch/NNNN.

    job.json                      kind and resolved config: everything that a node needs
    slurm.json                    job id, number of array tasks
    logs/                         the sbatch script, the output of each task
    ended/ARRAY_RESTART_NODE.json how one node of one attempt ended
    attempts/ARRAY.jsonl          why each attempt ended, and the action after it
    verdict/ARRAY.json            the final result: exit code and reason in one line

Files are written atomically; readers need no SLURM.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from flowmask.launch.jobs import KINDS
from flowmask.launch.jobs.job import Job
from flowmask.models.errors import ConfigError
from flowmask.models.files import sync_open, write_atomically
from flowmask.models.folders.output_folder import OutputFolder
from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.typed import parse_as, read_as

Why = Literal["finished", "mistake", "crashed", "preempted", "time limit", "node lost", "cancelled", "stopped"]


Code = Annotated[int, Field(ge=-255, le=255)]


@dataclass(frozen=True)
class SubmittedJob:
    """Contents of job.json."""

    kind: str
    config: dict[str, Any]


@dataclass(frozen=True)
class SlurmJob:
    """Contents of slurm.json. The id is passed to SLURM's commands, so it must be a number."""

    job_id: Annotated[str, Field(pattern=r"^[0-9]{1,19}$")]
    array: Annotated[int, Field(ge=1, le=4_000_001)]  # SLURM's own limit


@dataclass(frozen=True)
class NodeEnd:
    """How the ranks of one node ended: an exit code of FlowMask, and a message."""

    code: Code
    message: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class Attempt:
    """One start of a job, up to its end; `why` is None while it runs, or if it was killed."""

    restart: Annotated[int, Field(ge=0, lt=1 << 31)]
    why: Why | None = None
    message: str = ""
    checkpoint: str = ""


@dataclass(frozen=True)
class Verdict:
    """The final result of a job or of one array task."""

    code: Code
    why: Why
    message: str = ""


T = TypeVar("T")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Inside the block, an unreadable or damaged file is a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}); submit the job again") from None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())}); submit the job again") from None


def _read(path: Path, kind: type[T]) -> T:
    with _damage_named(path):
        return read_as(path, kind)


@dataclass(frozen=True)
class Submission:
    """The files of one submission below `folder`."""

    folder: Path

    @classmethod
    def create(cls, out: Path, *, kind: str, resolved: dict[str, Any]) -> "Submission":
        """Create a numbered folder in OUT/launch with the job. Raises ConfigError if it is not writable."""
        OutputFolder(out, KINDS[kind].folder_kind())
        folder = cls.planned(out).folder
        try:
            folder.mkdir(parents=True)
            for name in ("logs", "ended", "attempts", "verdict"):
                (folder / name).mkdir()
            write_atomically(folder / "job.json", json.dumps({"kind": kind, "config": resolved}, indent=1))
        except OSError as error:
            raise ConfigError(f"out is {out}; it is not writable ({error.strerror}): choose another out") from error
        return cls(folder)

    def forget(self) -> None:
        """Delete the folder of a submission that SLURM did not take: it would look like a run that has not begun."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()  # if it is empty

    @classmethod
    def planned(cls, out: Path) -> "Submission":
        """The folder that the next submission will have; nothing is written."""
        root = out.resolve() / "launch"
        taken = [int(path.name) for path in root.glob("[0-9]*") if path.name.isdecimal()]
        return cls(root / f"{max(taken, default=0) + 1:04d}")

    @classmethod
    def latest(cls, out: Path) -> "Submission | None":
        """The newest submission of the job in `out`; None if it was never submitted."""
        root = out / "launch"
        found = sorted(path for path in root.glob("[0-9]*") if (path / "job.json").is_file())
        return cls(found[-1]) if found else None

    @property
    def out(self) -> Path:
        return self.folder.parent.parent

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def job(self) -> tuple[str, dict[str, Any]]:
        """Kind and resolved config."""
        job = _read(self.folder / "job.json", SubmittedJob)
        if job.kind not in KINDS:
            raise ConfigError(f"{self.folder / 'job.json'} is damaged: kind is {job.kind[:40]!r}; submit the job again")
        return job.kind, job.config

    def kind(self) -> type[Job]:
        """The class of the job."""
        return KINDS[self.job()[0]]

    def set_slurm(self, *, job_id: str, array: int) -> None:
        """Save the job id of SLURM."""
        write_atomically(self.folder / "slurm.json", json.dumps({"job_id": job_id, "array": array}))

    def slurm(self) -> tuple[str, int]:
        """SLURM's job id and the number of array tasks."""
        known = _read(self.folder / "slurm.json", SlurmJob)
        return known.job_id, known.array

    def set_ended(self, end: NodeEnd, *, array: int, restart: int, node: int) -> None:
        """Record how a node ended in an attempt."""
        write_atomically(self._ended(array, restart, node), json.dumps(asdict(end)))

    def ended(self, *, array: int, restart: int, nodes: int) -> list[NodeEnd | None]:
        """How each node ended in an attempt; None for a node that was killed before it could record it."""
        paths = [self._ended(array, restart, node) for node in range(nodes)]
        return [_read(path, NodeEnd) if path.exists() else None for path in paths]

    def add_attempt(self, attempt: Attempt, *, array: int) -> None:
        """Add a row; a later row of the same restart replaces an earlier one."""
        with (self.folder / "attempts" / f"{array:05d}.jsonl").open("ab") as file:
            file.write(json.dumps(asdict(attempt)).encode() + b"\n")
            sync_open(file)

    def attempts(self, *, array: int) -> list[Attempt]:
        """Every attempt so far, in the order of their starts."""
        return self._attempts_in(self.folder / "attempts" / f"{array:05d}.jsonl")

    def all_attempts(self) -> list[Attempt]:
        """The attempts of all array tasks."""
        found = sorted((self.folder / "attempts").glob("[0-9]*.jsonl"))
        return [attempt for path in found for attempt in self._attempts_in(path)]

    @staticmethod
    def _attempts_in(path: Path) -> list[Attempt]:
        if not path.exists():
            return []
        with _damage_named(path):
            rows = [parse_as(line, Attempt) for line in read_regular(path).splitlines()]
        return sorted({row.restart: row for row in rows}.values(), key=lambda row: row.restart)

    def set_verdict(self, verdict: Verdict, *, array: int) -> None:
        """Record that this array task has ended for good, and why."""
        write_atomically(self.folder / "verdict" / f"{array:05d}.json", json.dumps(asdict(verdict)))

    def verdicts(self) -> dict[int, Verdict]:
        """The verdicts of the array tasks that have ended for good."""
        found = sorted((self.folder / "verdict").glob("[0-9]*.json"))
        return {int(path.stem): _read(path, Verdict) for path in found if path.stem.isdecimal()}

    def log_tail(self, lines: int = 20) -> Sequence[str]:
        """The last lines of the newest error log."""
        found = sorted(self.logs.glob("*_log.err"), key=lambda path: path.stat().st_mtime)
        return found[-1].read_text(errors="replace").splitlines()[-lines:] if found else []

    def _ended(self, array: int, restart: int, node: int) -> Path:
        return self.folder / "ended" / f"{array:05d}_{restart:03d}_{node:05d}.json"
