"""The ranks of a training on eight ranks at any size, one after another: real engine and DeepSpeed, tensors of the meta
device, which have no elements, and a fake process group.

python fake_ranks.py CONFIG WAN RANKS [OVERRIDE ...]

RANKS: as 0,7. Prints for each rank its pieces: [name, start, elements].
"""

import json
import multiprocessing
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from flowmask.launch.config import load_job
from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.model import architecture, trained_module
from flowmask.trainer import distributed
from flowmask.trainer.step import zero
from flowmask.trainer.step.engine import Engine

WORLD = 8


def pretend() -> None:
    """Make the meta device that of the engine and of DeepSpeed; copies between it and host memory move nothing."""
    zero._deepspeed()  # imported once
    from deepspeed.accelerator import get_accelerator

    accelerator, copy = get_accelerator(), Tensor.copy_

    def copied(to: Tensor, source: Tensor, *more: Any) -> Tensor:
        return to if source.is_meta else copy(to, source, *more)

    distributed.device = lambda: torch.device("meta")
    accelerator.device_name = accelerator.current_device_name = accelerator.current_device = lambda *_: "meta"
    Tensor.cpu, Tensor.copy_ = lambda tensor: tensor, copied  # type: ignore[method-assign,assignment]


def pieces(job: TrainJob, wan: Path, rank: int) -> list[tuple[str, int, int]]:
    """The pieces of the masters on one rank of eight; the other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    engine = Engine(trained_module(job, architecture(wan)).to("meta"), train=job.train)
    for piece in engine.fragments():
        assert piece.exp_avg.numel() == piece.exp_avg_sq.numel() == piece.numel
    return [(piece.name, piece.start, piece.numel) for piece in engine.fragments()]


def main(config: str, wan: str, ranks: str, *overrides: str) -> None:
    pretend()
    changes = [f"model.wan={wan}", f"launch.processes_per_node={WORLD}", *overrides]
    job = load_job(Path(config), TrainJob, changes)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # DeepSpeed keeps its first group
        found = pool.map(partial(pieces, job, Path(wan)), map(int, ranks.split(",")), chunksize=1)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
