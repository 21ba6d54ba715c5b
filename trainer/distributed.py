"""The process group: rank and world size of this process, and the few collectives of the trainer.

The only file that imports `torch.distributed`. A process without launcher variables is a group of one,
so callers need not check whether they run alone. Ranks meet through a file, or at a socket that listens before
any rank starts, and communicate over the network interface that leads there. A collective that waits longer than the
timeout ends the process with an error instead of stalling the job.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flowmask.models.device import rank_device
from flowmask.models.errors import ConfigError, RankLostError
from flowmask.trainer.phases import Pending, Phases

_LOST = (  # messages of gloo, NCCL and the file store when a peer does not answer
    "Timed out waiting",
    "Timeout waiting for key",
    "Wait timeout",
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
    "Broken pipe",
    "NCCL",
)
_VARIABLES = ("RANK", "WORLD_SIZE", "FLOWMASK_MEET")
_COLLECTIVES = (  # of torch.distributed, by the names that DeepSpeed and this file use
    *("all_reduce", "reduce", "broadcast", "broadcast_object_list", "barrier", "all_to_all_single"),
    *("all_gather", "all_gather_object", "all_gather_into_tensor", "all_gather_single"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single"),
)
_watching: list[Phases] = []


def init(*, timeout_s: float = 1800.0) -> None:
    """Join the group that the launcher's variables describe; does nothing if already joined.

    Reads RANK, WORLD_SIZE, LOCAL_RANK; FLOWMASK_MEET: a file, or ADDRESS:PORT; with an address, rank 0 also reads
    FLOWMASK_LISTENER: the descriptor of the listening socket. Without any of them the group is this process. Uses
    NCCL if there is a GPU, else gloo. Raises ConfigError when only some are set, when ranks would share a GPU, or when
    a network interface that the user names does not exist.
    """
    if dist.is_initialized():
        return
    backend = "cuda:nccl,cpu:gloo" if device().type == "cuda" else "gloo"
    present = [name for name in _VARIABLES if name in os.environ]
    missing = sorted(set(_VARIABLES) - set(present))
    if present and missing and os.environ.get("WORLD_SIZE") != "1":
        raise ConfigError(f"{', '.join(missing)} missing, but {', '.join(present)} is set; use `flowmask train`")
    own, world, meet = (os.environ.get(name, other) for name, other in zip(_VARIABLES, ("0", "1", "")))
    timeout = timedelta(seconds=timeout_s)
    _choose_interfaces(meet, nccl="nccl" in backend)
    store = _store(meet, int(own), int(world), timeout) if int(world) > 1 else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=int(own), world_size=int(world), timeout=timeout)
    if int(world) > 1:
        _time_collectives()  # before DeepSpeed, which stores some of them


def _store(meet: str, own: int, world: int, timeout: timedelta) -> dist.Store:
    """The store by which ranks find each other. Anyone who can write to it can run code in them, so on one machine it
    is a file in a folder of mode 0700, and on several machines a socket on a single address."""
    address, port = _address(meet)
    if not port:
        return dist.FileStore(meet, world)
    listener = int(os.environ["FLOWMASK_LISTENER"]) if own == 0 else None
    return dist.TCPStore(address, port, world, is_master=own == 0, timeout=timeout, master_listen_fd=listener)


def _address(meet: str) -> tuple[str, int]:
    """Address and port of the rendezvous; this machine's own address and 0 if it is a file."""
    address, _, port = meet.rpartition(":")
    return (address, int(port)) if address and port.isdecimal() and "/" not in meet else ("127.0.0.1", 0)


def _choose_interfaces(meet: str, *, nccl: bool) -> None:
    """Refuse interfaces that do not exist. If the user names none, set gloo's to the one that leads to the rendezvous.

    By default gloo takes the interface of the host's name: it may be missing, wrong, or public.
    """
    ip = (socket.AF_INET, socket.AF_INET6)
    there = [name for name, found in psutil.net_if_addrs().items() if any(one.family in ip for one in found)]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")[: 1 + nccl]:
        value = os.environ.get(variable)
        if value and not _names_interfaces(variable, value, there):
            where = f"{os.uname().nodename} has no such network interface"
            raise ConfigError(
                f"{variable} is {value}; {where}; it has {', '.join(there)}; unset it, or choose one of them"
            )
    if not os.environ.get("GLOO_SOCKET_IFNAME") and (leads_there := _interface_towards(_address(meet)[0])):
        os.environ["GLOO_SOCKET_IFNAME"] = leads_there


def _names_interfaces(variable: str, value: str, there: list[str]) -> bool:
    """Whether a variable's value matches an interface.

    gloo takes full names; NCCL prefixes (`=`: full names, `^`: all others).
    """
    names = value.lstrip("^=").split(",")
    if variable.startswith("GLOO"):
        return set(names) <= set(there)
    if value.startswith("="):
        return not set(names).isdisjoint(there)
    return value.startswith("^") or any(name.startswith(tuple(names)) for name in there)


def _interface_towards(address: str) -> str | None:
    """The network interface by which this machine reaches an address; None if unknown."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if any(a.address.partition("%")[0] == own for a in found)), None)


def record_flights(folder: Path) -> None:
    """Call before `init`: NCCL keeps its last collectives, and writes them into `folder` when one times out."""
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / "nccl_rank_"),
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def watched(phases: Phases) -> Iterator[None]:
    """Inside the block, waiting in every collective of this process is timed, also in DeepSpeed's calls."""
    _watching.append(phases)
    try:
        yield
    finally:
        _watching.remove(phases)


def _time_collectives() -> None:
    for name in _COLLECTIVES:
        call = getattr(dist, name, None)
        if call is not None and not hasattr(call, "watched"):
            setattr(dist, name, _timed(name, call))


def _timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def timed(*args: Any, **named: Any) -> Any:
        if not _watching:
            return call(*args, **named)
        phases = _watching[-1]
        begun = phases.begin(name, (*args, *named.values()))
        with phases.waiting(begun):
            work = call(*args, **named)
        return Pending(work, begun, phases) if hasattr(work, "wait") else work

    timed.watched = True  # type: ignore[attr-defined]
    return timed


def limit_waits(timeout_s: float) -> None:
    """Set this timeout for every group: groups made by libraries have another default."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


@contextmanager
def lost_ranks_named(timeout_s: float, *, why: Callable[[], str] = str) -> Iterator[None]:
    """Inside the block, a collective that another rank does not join raises RankLostError, in one line.

    why: called then; returns the known facts about the missing rank, or ""
    """
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, dist.DistError)
        if not known and not any(words in str(error) for words in _LOST):
            raise
        own, known_of_it = rank() or os.environ.get("RANK", 0), why()
        raise RankLostError(
            f"rank {own} lost contact with another rank, which has ended or did not answer for {timeout_s:g} s "
            f"(train.collective_timeout_s); start again: the last checkpoint is complete"
            + (f". {known_of_it}" if known_of_it else "")
        ) from error


def shutdown() -> None:
    """Leave the group; does nothing without a group."""
    if dist.is_initialized():
        sequence_mesh.cache_clear()
        dist.destroy_process_group()


def rank() -> int:
    """Rank of this process; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@lru_cache
def sequence_mesh(ranks: int) -> DeviceMesh:
    """The ranks as a mesh [data, ring 1, ulysses `ranks`]: ranks of one row share their examples. Collective."""
    shape = (world_size() // ranks, 1, ranks)
    return init_device_mesh(device().type, shape, mesh_dim_names=("data", "ring", "ulysses"))


def device() -> torch.device:
    """The device of this process: its own GPU, else the CPU."""
    return rank_device(exclusive=True)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor`, of any shape, over all ranks, in place; every rank ends with the same bits."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_to_rank_zero(tensor: Tensor) -> Tensor:
    """Sum `tensor`, of any shape, over all ranks, in place on rank 0; the other ranks' copies are then undefined."""
    if world_size() > 1:
        dist.reduce(tensor, dst=0)
    return tensor


def any_true(flag: bool) -> bool:
    """Whether `flag` is true on any rank; the same on every rank."""
    return bool(all_reduce_sum(torch.tensor([int(flag)], dtype=torch.int64)).item())


def sum_each(*votes: int) -> list[int]:
    """The sum over all ranks of each of several small numbers, in one reduction; for flags: how many ranks set it."""
    found: list[int] = all_reduce_sum(torch.tensor(list(map(int, votes)), dtype=torch.int64)).tolist()
    return found


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` (any picklable object) on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's `tensor`, of any shape, on every rank, in place."""
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
    """Wait until every rank has called this."""
    any_true(False)
