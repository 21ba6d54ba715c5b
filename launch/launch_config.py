"""The config section `launch`: number and place of the processes of a job."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from flowmask.models.config import Section
from flowmask.models.safe.secrets import SecretLine, SecretOption


def _option(value: Any) -> str | Literal[True]:
    """An option's value as sbatch gets it: a number as text."""
    if isinstance(value, str) or value is True:
        return value
    if isinstance(value, int | float) and value is not False:
        return str(value)
    kind = "empty" if value is None else "false" if value is False else f"a {type(value).__name__}"  # may be a secret
    raise ValueError(f"it is {kind}; give a text or a number, or true for an option without a value")


def _minutes(value: Any) -> Any:
    if isinstance(value, str) and not value.strip().isdecimal():  # ${oc.env:NAME} is a text too
        raise ValueError(f"launch.time_min is {value!r}; it is a number of minutes: 1440 for 24 hours")
    return value


Option = Annotated[SecretOption | Literal[True], BeforeValidator(_option)]


class LaunchConfig(Section):
    """Number and place of the processes. `local`: this machine; `slurm`: submitit; `debug`: the current process."""

    cluster: Literal["local", "slurm", "debug"] = Field(
        "local", description="this machine, SLURM, or the current process"
    )
    nodes: int = Field(1, ge=1, description="nodes of the job, or of each array task")
    processes_per_node: int = Field(
        1, ge=1, description="processes on each node: one per GPU; without GPUs at most one per core"
    )
    array: int = Field(1, ge=1, description="array tasks that share a cache build, each on `nodes` nodes")
    array_parallel: int | None = Field(None, ge=1, description="array tasks that may run at once; None: all")
    gpus_per_node: int | None = Field(
        None, ge=0, description="GPUs of each node; None: one per process if the partition has GPUs; 0: a CPU job"
    )
    cpus_per_node: int | None = Field(
        None,
        ge=1,
        description="CPUs of each node; None: one per process plus its reading threads (data.threads, "
        "cache.decode_threads), at most those of the partition's smallest node",
    )
    mem_gb: float | None = Field(None, gt=0, description="memory of each node; None: the partition's default")
    time_min: Annotated[int | None, BeforeValidator(_minutes)] = Field(
        None, ge=1, description="time limit; None: the partition's default"
    )
    partition: str | None = Field(None, description="sbatch --partition")
    account: str | None = Field(None, description="sbatch --account")
    qos: str | None = Field(None, description="sbatch --qos")
    constraint: str | None = Field(None, description="sbatch --constraint, for example a kind of GPU")
    setup: tuple[SecretLine, ...] = Field((), description="shell lines to run before the job: modules, variables")
    srun_args: tuple[SecretOption, ...] = Field((), description="options for srun, for example a container image")
    sbatch_args: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], Option] = Field(
        {}, description="other options of sbatch, by long name; true for an option without a value"
    )
    signal_margin_s: int = Field(90, ge=1, description="seconds before the time limit at which a checkpoint is saved")
    max_preemptions: int = Field(100, ge=0, description="restarts after preemptions before the job ends for good")
    max_timeouts: int = Field(100, ge=0, description="restarts after time limits before the job ends for good")
    max_crashes: int = Field(2, ge=0, description="restarts after crashes before the job ends for good")

    @model_validator(mode="after")
    def _fits(self) -> "LaunchConfig":
        if self.cluster == "local" and self.nodes != 1:
            raise ValueError(
                f"launch.nodes is {self.nodes}; launch.cluster=local uses only this machine: set launch.nodes=1"
            )
        if self.cluster != "slurm" and self.array != 1:
            raise ValueError(
                f"launch.array is {self.array}; it splits a cache build on SLURM: set launch.cluster=slurm; "
                "on this machine set launch.processes_per_node"
            )
        if self.cluster == "slurm" and self.time_min and self.time_min * 60 <= self.signal_margin_s:
            raise ValueError(
                f"launch.signal_margin_s is {self.signal_margin_s}; it must be less than "
                f"launch.time_min {self.time_min} x 60 s"
            )
        for key in ("partition", "account", "qos", "constraint"):
            if (value := getattr(self, key)) is not None and value.split() != [value]:
                raise ValueError(f"launch.{key} is {value!r}; it may hold no space")
        if any(key.replace("_", "-") == "no-requeue" for key in self.sbatch_args):
            raise ValueError(
                "launch.sbatch_args has no-requeue, but FlowMask requeues a job itself to go on with it; to forbid "
                "that, set launch.max_preemptions=0, launch.max_timeouts=0 and launch.max_crashes=0"
            )
        return self

    @property
    def world_size(self) -> int:
        """Number of processes that train or evaluate together."""
        return 1 if self.cluster == "debug" else self.nodes * self.processes_per_node

    def refuse_array(self) -> None:
        """Raises ValueError for a job that can't be split into array tasks."""
        if self.array != 1:
            raise ValueError(
                f"launch.array is {self.array}; only a cache build can use array tasks: set launch.array=1"
            )
