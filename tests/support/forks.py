"""Processes forked from a server that has imported everything once, which saves six seconds of CPU at each start."""

import gc
import multiprocessing
import os
import signal
import subprocess
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import children

OVERLAY_SHORT_SIDE_PX = 96
_IMPORTED_ONCE = [
    "flowmask.launch.cli.main",
    "flowmask.launch.dispatch",
    "flowmask.launch.jobs",
    "flowmask.trainer.run.train",
    "flowmask.trainer.score.evaluate",
    "flowmask.data_pipeline.build.build",
    "flowmask.data_pipeline.check.repair",
    "deepspeed",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.models.transformers.transformer_wan",
    "mlflow.store.tracking.sqlalchemy_store",
]


def start_fork(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A multiprocessing.Process that calls a function of an importable module, in the present folder.

    environment: its variables; None: the present ones
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would start a thread
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    process = context.Process(
        target=_call, args=(dict(environment or os.environ), str(Path.cwd()), function, arguments)
    )
    process.start()
    return process


def draw_small_overlays() -> None:
    """From now on, this process enlarges small videos less, which was half the time of evaluations in tests."""
    from flowmask.trainer.predict.show import overlay

    overlay.SHORT_SIDE_PX = OVERLAY_SHORT_SIDE_PX


def _call(environment: dict[str, str], folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    gc.freeze()  # what the server has imported stays
    subprocess.Popen = children.Popen  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    draw_small_overlays()
    function(*arguments)


class Forked:
    """`function(say, *arguments)` in a forked process; `say` sends lines, which `follow` and `finish` read here."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reader, writer = multiprocessing.get_context("forkserver").Pipe(duplex=False)
        self._process = start_fork(_reporting, writer, function, arguments)
        writer.close()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def running(self) -> bool:
        return self._process.exitcode is None

    def signal(self, number: int) -> None:
        """Send a signal, unless the process is gone."""
        with suppress(ProcessLookupError):  # gone, and its end is not known here yet
            if self.running:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        self.signal(signal.SIGKILL)
        self._process.join()

    def follow(self, lines: int) -> str:
        """Read this many lines, fewer if the process ends; return the last line."""
        last = ""
        for _ in range(lines):
            last = self._line() or last
        return last

    def finish(self, *, timeout_s: float = 300) -> tuple[int, str]:
        """Wait for the end: the exit code, or minus the signal, and the last line, which is a failure's trace."""
        last = ""
        while line := self._line(timeout_s):
            last = line
        self._process.join(timeout_s)
        return self._process.exitcode, last

    def _line(self, timeout_s: float | None = None) -> str:
        """The next line, "" at the end."""
        try:
            if timeout_s is not None:
                assert self._reader.poll(timeout_s), f"no line within {timeout_s} s"
            return str(self._reader.recv())
        except (EOFError, OSError):
            return ""


def _reporting(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        function(pipe.send, *arguments)
    except Exception:
        pipe.send(traceback.format_exc())
        raise
