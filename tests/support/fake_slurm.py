"""Commands `scontrol` and `sbatch` that answer as on a cluster with these partitions, and send nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

_PARTITION = (
    "PartitionName={name} AllowGroups=ALL Default={default} QoS=N/A GraceTime=0 MaxNodes=UNLIMITED "
    "MaxTime=1-00:00:00 MaxCPUsPerNode=UNLIMITED State=UP TotalNodes={count} JobDefaults=(null) TRES=cpu=64,node=1"
)
_NODE = (
    "NodeName={name} Arch=x86_64 CPUAlloc=0 CPUEfctv={cpus} CPUTot={cpus} CPULoad=0.1 Gres={gres} "
    "OS=Linux 6.1.0 #1 SMP State=IDLE Partitions=all,{partition}  CfgTRES=cpu={cpus},mem=500G AllocTRES="
)


def fake_slurm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, partitions: Mapping[str, Sequence[tuple[str, int]]]
) -> None:
    """Put a fake SLURM on PATH. partitions: (Gres, CPUs) of the nodes of each; the first partition is the default."""
    shown = [
        _PARTITION.format(name=name, default="NO" if number else "YES", count=len(nodes))
        for number, (name, nodes) in enumerate(partitions.items())
    ]
    nodes = [
        _NODE.format(name=f"{name}{number}", cpus=cpus, gres=gres, partition=name)
        for name, each in partitions.items()
        for number, (gres, cpus) in enumerate(each)
    ]
    bin_ = folder / "bin"
    bin_.mkdir()
    (bin_ / "partition").write_text("\n".join(shown) + "\n")
    (bin_ / "node").write_text("\n".join(nodes) + "\n")
    (bin_ / "scontrol").write_text(f'#!/bin/sh\nexec /bin/cat "{bin_}/$2"\n')
    (bin_ / "sbatch").write_text("#!/bin/sh\n[ \"$1\" = --test-only ] && echo 'sbatch: Job 1 to start at noon'\n")
    for name in ("scontrol", "sbatch"):
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_))
