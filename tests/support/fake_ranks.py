"""The ranks of a training on eight ranks at any size, one after another: real engine and DeepSpeed, fake tensors, fake
process group.

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
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from flowmask.launch.config import load_job
from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.model import architecture, trained_module
from flowmask.models.cost.dry_run import materialise
from flowmask.trainer.step import zero
from flowmask.trainer.step.engine import Engine

WORLD = 8


def pretend() -> None:
    """Give all fake tensors the aligned address 0, and leave them on their device."""
    from diffusers.models.modeling_utils import ModelMixin

    def stay(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return module

    FakeTensor.data_ptr = lambda _: 0  # type: ignore[method-assign]
    nn.Module.to = ModelMixin.to = stay  # type: ignore[method-assign,assignment]


def pieces(job: TrainJob, wan: Path, rank: int) -> list[tuple[str, int, int]]:
    """The pieces of the masters on one rank of eight; the other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    module = trained_module(job, architecture(wan))
    with FakeTensorMode():
        materialise(module, torch.float32)
        engine = Engine(module, train=job.train)
        for piece in engine.fragments():
            assert piece.exp_avg.numel() == piece.exp_avg_sq.numel() == piece.numel
        return [(piece.name, piece.start, piece.numel) for piece in engine.fragments()]


def main(config: str, wan: str, ranks: str, *overrides: str) -> None:
    pretend()
    zero._deepspeed()  # imported once; DeepSpeed keeps its first group, so each rank is a fork
    changes = [f"model.wan={wan}", f"launch.processes_per_node={WORLD}", *overrides]
    job = load_job(Path(config), TrainJob, changes)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = pool.map(partial(pieces, job, Path(wan)), map(int, ranks.split(",")), chunksize=1)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
