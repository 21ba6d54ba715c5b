"""The process group: who this process is, and the few collectives that the trainer needs.

The only file that imports `torch.distributed`. One process without any launcher variables is a group of one,
so nothing above has to ask whether it runs alone. A collective that waits longer than the timeout ends the
process with an error instead of stalling the job.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flowmask.models.device import rank_device
from flowmask.models.errors import ConfigError, RankLostError

_LOST = (  # what gloo and NCCL say when a peer does not answer any more
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
    "Broken pipe",
    "NCCL",
)
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init(*, timeout_s: float = 1800.0) -> None:
    """Join the group that the launcher's variables describe; a no-op when already joined.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without any of them the group is this
    process. NCCL where there is a GPU, else gloo. Raises ConfigError when only some of the variables are set, or
    when ranks would share a GPU.
    """
    if dist.is_initialized():
        return
    backend = "cuda:nccl,cpu:gloo" if device().type == "cuda" else "gloo"
    present = [name for name in _VARIABLES if name in os.environ]
    timeout = timedelta(seconds=timeout_s)
    if "RANK" not in present and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = sorted(set(_VARIABLES) - set(present))
    if missing:
        raise ConfigError(f"{', '.join(missing)} not set though {', '.join(present)} is; use `flowmask train`")
    dist.init_process_group(backend, timeout=timeout)


def limit_waits(timeout_s: float) -> None:
    """Give every group this timeout: those that a library made for itself have a default of their own."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


@contextmanager
def lost_ranks_named(timeout_s: float) -> Iterator[None]:
    """While inside, a collective that another rank does not come to raises RankLostError, in one line."""
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, dist.DistBackendError | dist.DistNetworkError)
        if not known and not any(words in str(error) for words in _LOST):
            raise
        raise RankLostError(
            f"rank {rank()} lost touch with another rank, which is gone or did not answer for "
            f"{timeout_s:g} s (train.collective_timeout_s); start again: the last checkpoint is whole"
        ) from error


def shutdown() -> None:
    """Leave the group; a no-op when not in one."""
    if dist.is_initialized():
        sequence_mesh.cache_clear()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number in the group; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@lru_cache
def sequence_mesh(ranks: int) -> DeviceMesh:
    """The ranks as a mesh [data, ring 1, ulysses `ranks`]: each row of neighbours shares its examples. Collective."""
    shape = (world_size() // ranks, 1, ranks)
    return init_device_mesh(device().type, shape, mesh_dim_names=("data", "ring", "ulysses"))


def device() -> torch.device:
    """Where this process computes: its own GPU, else the CPU."""
    return rank_device(exclusive=True)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place; every rank ends with the same bits."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_to_rank_zero(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place on rank 0; the other ranks' copies are then undefined."""
    if world_size() > 1:
        dist.reduce(tensor, dst=0)
    return tensor


def any_true(flag: bool) -> bool:
    """Whether any rank said yes; every rank gets the same answer."""
    return bool(all_reduce_sum(torch.tensor([int(flag)], dtype=torch.int64)).item())


def any_true_each(*flags: bool) -> list[bool]:
    """`any_true` of several questions in one reduction."""
    votes = all_reduce_sum(torch.tensor([int(flag) for flag in flags], dtype=torch.int64))
    return [bool(vote) for vote in votes.tolist()]


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` (any picklable object) on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's `tensor` on every rank, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    any_true(False)
