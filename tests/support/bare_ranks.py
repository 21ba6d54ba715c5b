"""Ranks that do the minimum: meet, sum once, end. As a program, this file launches them LAUNCHES times.

python bare_ranks.py OUT LAUNCHES [FIRST_RANK MEET]   MEET: a folder that two such programs share, as two nodes do
"""

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


def launch(out: Path, launches: int, first_rank: int = 0, shared: Path | None = None) -> int:
    """Launch the ranks this many times, as a job's ranks are launched; 0 if every launch ended with 0."""
    from flowmask.launch.local import processes
    from flowmask.launch.slurm import task

    processes.python_module = lambda *_: [sys.executable, "-P", __file__]  # type: ignore[assignment]
    os.environ["BARE_OUT"] = str(out)
    for number in range(launches):
        group = None
        if shared is not None:
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
            return code
    return 0


if __name__ == "__main__":
    from flowmask.launch.local.worker import run_process

    if len(sys.argv) == 1:
        run_process(rank)
    folder, count, *node = sys.argv[1:]
    sys.exit(launch(Path(folder), int(count), *([int(node[0]), Path(node[1])] if node else [])))
