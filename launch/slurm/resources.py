"""The resources that a job requests of each SLURM node: fills in GPUs and CPUs that `launch` leaves unset.

The one place that turns an unset launch.gpus_per_node or launch.cpus_per_node into numbers, from the nodes of the
partition. A job that can use a GPU is never submitted without one by accident: it requests GPUs or is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from flowmask.launch.finding import Finding
from flowmask.launch.jobs.job import Job
from flowmask.launch.launch_config import LaunchConfig
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.models.errors import ConfigError

_ASKS_FOR_GPUS = re.compile(r"gpus|gpus-per-\w+|gres|tres-per-\w+")  # options of sbatch


@dataclass(frozen=True)
class Asked:
    """`launch` with CPUs set, and GPUs if known; one line that describes them; findings against the request."""

    launch: LaunchConfig
    said: str
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class _Partition:
    """SLURM's facts about a partition's nodes, or why there are none. `exists`: SLURM knows the partition."""

    said: str
    exists: bool = True
    why_not: str = ""
    most_gpus: int | None = None
    least_cpus: int | None = None


def settle(job: Job) -> Asked:
    """The resources to request. Queries SLURM only for unset values. Refuses nothing; see `findings`."""
    launch, elsewhere = job.launch, _asked_elsewhere(job.launch)
    open_gpus = launch.gpus_per_node is None and job.computes_on != "cpu" and not elsewhere
    partition = _Partition("the partition")
    if open_gpus or launch.cpus_per_node is None:
        partition = _partition(launch.partition)
    gpus, findings = launch.gpus_per_node, tuple[Finding, ...]()
    if open_gpus:
        gpus = launch.processes_per_node if partition.most_gpus else None
        findings = (_judge(launch, partition),) if partition.exists else ()
    if gpus is not None and (idle := gpus - launch.processes_per_node) > 0:
        used = f"{counted(launch.processes_per_node, 'process')} on each, one GPU per process"
        fix = (
            f"{counted(idle, 'GPU')} would be idle; set launch.processes_per_node={gpus}, or lower launch.gpus_per_node"
        )
        findings += (Finding("GPUs", "warn", f"launch.gpus_per_node is {gpus}, with {used}: {fix}"),)
    cpus, because = _cpus(job, partition)
    known = "GPUs unknown" if open_gpus and partition.most_gpus is None else counted(gpus or 0, "GPU")
    said = elsewhere or f"{known}{' (one per process)' * bool(open_gpus and gpus)}"
    settled = launch.model_copy(update={"gpus_per_node": gpus, "cpus_per_node": cpus})
    return Asked(settled, f"each node: {said}, {counted(cpus, 'CPU')}{because}", findings)


def gpus_of(node: Mapping[str, str]) -> int:
    """GPUs of a node or a partition in scontrol's output."""
    gres = re.sub(r"\([^)]*\)", "", node.get("Gres", ""))  # `gpu:a100:8(S:0-1)`: its sockets
    kinds = [entry.split(":") for entry in gres.split(",")]
    counted = sum(int(kind[-1]) if kind[-1].isdecimal() else 1 for kind in kinds if kind[0] == "gpu")
    tracked = re.search(r"(?:^|,)gres/gpu=(\d+)", node.get("CfgTRES", node.get("TRES", "")))
    return counted or (int(tracked[1]) if tracked else 0)


def _asked_elsewhere(launch: LaunchConfig) -> str:
    """The GPUs that launch.sbatch_args asks for; empty if none."""
    options = {key.replace("_", "-"): value for key, value in launch.sbatch_args.items()}
    asked = [
        f"{key}={value}" for key, value in options.items() if _ASKS_FOR_GPUS.fullmatch(key) and "gpu" in f"{key}{value}"
    ]
    return f"GPUs by launch.sbatch_args ({', '.join(asked)})" if asked else ""


def _partition(name: str | None) -> _Partition:
    said = f"partition {name}" if name else "the default partition"
    try:
        facts = slurm_commands.partition(name)
        said = f"partition {facts['PartitionName']}"
        nodes = slurm_commands.nodes_of(facts["PartitionName"])
    except slurm_commands.NoPartitionError:
        return _Partition(said, exists=False)
    except ConfigError as error:
        return _Partition(said, why_not=str(error))
    cpus = [node.get("CPUEfctv", node.get("CPUTot", "")) for node in nodes]
    cpus.append(facts.get("MaxCPUsPerNode", ""))
    return _Partition(
        said,
        why_not="" if nodes else f"SLURM shows no nodes of {said}",
        # on a cluster that hides its nodes: the total of the partition, if it is known
        most_gpus=max(map(gpus_of, nodes), default=gpus_of(facts) or None),
        least_cpus=min((int(count) for count in cpus if count.isdecimal()), default=None),
    )


def _judge(launch: LaunchConfig, partition: _Partition) -> Finding:
    """Whether a job without launch.gpus_per_node can get one GPU per process."""
    wanted, most, fix = launch.processes_per_node, partition.most_gpus, "set it (0: a CPU job)"
    if not slurm_commands.available():
        found = "warning: launch.gpus_per_node is not set, and without SLURM it is unknown whether the partition "
        return Finding("GPUs", "unknown", f"{found}has GPUs: this script requests none; {fix}")
    if most is None:
        found = f"launch.gpus_per_node is not set, and its default is unknown: {partition.why_not}; {fix}"
        return Finding("GPUs", "fail", found)
    if most == 0:
        found = f"{partition.said} has no GPUs: choose another launch.partition, or run on its CPUs with "
        return Finding("GPUs", "fail", f"{found}launch.gpus_per_node=0")
    if wanted > most:
        found = f"launch.processes_per_node is {wanted}, one per GPU, but {partition.said} has no node with more than "
        return Finding("GPUs", "fail", f"{found}{counted(most, 'GPU')}: lower it, or set launch.gpus_per_node")
    return Finding("GPUs", "pass", f"{partition.said} has GPUs, {counted(most, 'GPU')} on a node at most")


def _cpus(job: Job, partition: _Partition) -> tuple[int, str]:
    """CPUs of a node, and the reason if `launch` does not set them."""
    launch = job.launch
    if launch.cpus_per_node is not None:
        return launch.cpus_per_node, ""
    threads = job.reading_threads
    need, most = launch.processes_per_node * (1 + threads), partition.least_cpus
    because = f"{counted(launch.processes_per_node, 'process')} x (1 + {counted(threads, 'reading thread')})"
    if most is None or need <= most:
        return need, f" ({because})"
    return most, f" (all of {partition.said}'s smallest node; {because} = {need} would be more)"


def counted(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"
