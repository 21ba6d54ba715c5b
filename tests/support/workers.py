"""Real gloo processes for tests: start N ranks of one group, run a function in each, collect the results.

Every process imports torch and DeepSpeed at its start (about 6 s), so a test asks one group for many results.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flowmask.launch.jobs import UNUSED
from flowmask.launch.local.worker import quieten_libraries, run_process
from flowmask.models.process import without

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that no process uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start_ranks(count: int, module: Path, function: str, *, folder: Path, arguments: dict[str, Any]) -> list[Any]:
    """Start `function(**arguments)` of the file `module` in `count` processes of one group."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, folder / "arguments.pt")
    (folder / "meet").unlink(missing_ok=True)
    group = {"WORLD_SIZE": str(count), "FLOWMASK_MEET": str(folder / "meet")}
    processes = []
    for rank in range(count):
        variables = os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        variables["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, __file__, str(module), function, str(folder)]
        with (folder / f"log_{rank}.txt").open("w") as log:
            processes.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
    return processes


def run_ranks(
    count: int, module: Path, function: str, *, folder: Path, timeout_s: float = 120, arguments: dict[str, Any]
) -> list[Any]:
    """The result of every rank, in rank order; a rank that fails or hangs fails the test with its output."""
    processes = start_ranks(count, module, function, folder=folder, arguments=arguments)
    until = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None and time.monotonic() >= until - timeout_s:
                _end(process)
    logs = "\n".join((folder / f"log_{rank}.txt").read_text()[-3000:] for rank in range(count))
    assert all(process.returncode == 0 for process in processes), logs
    return [torch.load(folder / f"result_{rank}.pt", weights_only=True) for rank in range(count)]


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def _main(module: Path, function: str, folder: Path) -> int:
    quieten_libraries()
    torch.set_num_threads(1)
    with without(*UNUSED):  # as ranks of a job do
        import diffusers.models.transformers.transformer_wan  # noqa: F401
    sys.path.insert(0, str(module.parent))
    spec = importlib.util.spec_from_file_location(module.stem, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module.stem] = loaded
    spec.loader.exec_module(loaded)
    arguments = torch.load(folder / "arguments.pt", weights_only=True)
    result = getattr(loaded, function)(**arguments)
    torch.save(result, folder / f"result_{os.environ['RANK']}.pt")
    return 0


if __name__ == "__main__":
    run_process(lambda: _main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
