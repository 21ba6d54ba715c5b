"""Ranks that do the minimum: meet, sum once, end. `launch` starts them several times; as a program, this is a rank."""

import atexit
import json
import os
import sys
import time
from pathlib import Path

RANKS = 2


def rank() -> int:
    """One rank; it writes its findings to OUT."""
    import psutil
    import torch

    from flowmask.launch.local.processes import die_with_parent
    from flowmask.trainer import distributed

    die_with_parent(int(os.environ["FLOWMASK_PARENT"]))
    torch.set_num_threads(1)
    distributed.init(timeout_s=300)
    atexit.register(distributed.shutdown)
    total = distributed.all_reduce_sum(torch.tensor([distributed.rank() + 1])).item()
    listens = {one.laddr.ip for one in psutil.Process().net_connections("tcp") if one.status == "LISTEN"}
    said = {"total": total, "world": distributed.world_size(), "listens": sorted(listens)}
    (Path(os.environ["BARE_OUT"]) / f"rank_{distributed.rank()}.json").write_text(json.dumps(said))
    return 0


def launch(words: list[str]) -> None:
    """Launch the ranks, as a job's ranks are launched; ends the process, with 0 if every launch ended with 0.

    words: OUT LAUNCHES [FIRST_RANK MEET]   MEET: a folder that two such processes share, as two nodes do
    """
    from flowmask.launch.local import processes
    from flowmask.launch.slurm import task

    out, launches, *node = words
    processes.python_module = lambda *_: [sys.executable, "-P", "-m", "bare_ranks"]  # type: ignore[assignment]
    os.environ["BARE_OUT"] = out
    for number in range(int(launches)):
        group = None
        if node:
            first_rank, shared = int(node[0]), Path(node[1])
            path, listener = shared / f"{number}.json", None
            if first_rank == 0:
                listener = task._listen("127.0.0.1")
                (shared / "new").write_text(json.dumps(listener.getsockname()))
                (shared / "new").rename(path)
            while not path.exists():
                time.sleep(0.02)
            meet = ":".join(map(str, json.loads(path.read_text())))
            group = processes.Group(first_rank, 2 * RANKS, meet, listener)
        code = processes.run_local("train", {}, processes=RANKS, group=group)
        if code:
            sys.exit(code)
    sys.exit(0)


if __name__ == "__main__":
    from flowmask.launch.local.worker import run_process

    run_process(rank)
