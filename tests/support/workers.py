"""Real gloo processes for tests: start N ranks of one group, run a function in each, collect the results."""

import importlib.util
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from forks import start_fork


def free_port() -> int:
    """A port that no process uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_ranks(
    count: int, module: Path, function: str, *, folder: Path, timeout_s: float = 120, arguments: dict[str, Any]
) -> list[Any]:
    """The result of `function(**arguments)` of the file `module` in every rank, in rank order.

    A rank that fails or hangs fails the test with its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, folder / "arguments.pt")
    (folder / "meet").unlink(missing_ok=True)
    processes = [start_fork(_rank, rank, count, module, function, folder) for rank in range(count)]
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.02)
    for process in processes:
        if process.exitcode is None:
            process.kill()
        process.join()
    logs = "\n".join((folder / f"log_{rank}.txt").read_text()[-3000:] for rank in range(count))
    assert all(process.exitcode == 0 for process in processes), logs
    return [torch.load(folder / f"result_{rank}.pt", weights_only=True) for rank in range(count)]


def be_rank(rank: int, ranks: int, *, meet: Path, log: Path) -> None:
    """Make this process a rank of a group, with its output in a file."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    group = {"FLOWMASK_MEET": meet, "WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in group.items()}, OMP_NUM_THREADS="1")


def _rank(rank: int, ranks: int, module: Path, function: str, folder: Path) -> None:
    be_rank(rank, ranks, meet=folder / "meet", log=folder / f"log_{rank}.txt")
    sys.path.insert(0, str(module.parent))
    spec = importlib.util.spec_from_file_location(module.stem, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module.stem] = loaded
    spec.loader.exec_module(loaded)
    arguments = torch.load(folder / "arguments.pt", weights_only=True)
    torch.save(getattr(loaded, function)(**arguments), folder / f"result_{rank}.pt")
