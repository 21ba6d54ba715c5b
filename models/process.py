"""Processes: start, end, and identification of a process from any node with access to its folder."""

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

CRASH_EXIT_CODE = 1
MISTAKE_EXIT_CODE = 2  # a UserError
REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: stopped on request with everything saved; start the same command again
OVER_EXIT_CODE = 100  # tells a batch script not to restart its job; no other program uses it
INTERRUPTED_EXIT_CODE = 130  # the shell's code for ^C
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)  # each requests to save and end
DEFAULT_LEASE_S = 120.0
_OF_A_GROUP = re.compile(  # variables that torchrun, mpirun, srun's PMI and FlowMask give a group's processes
    r"(?:(?:LOCAL|GROUP|NODE|ROLE)_)?(?:RANK|WORLD_SIZE)|MASTER_(?:ADDR|PORT)|"
    r"(?:TORCHELASTIC|OMPI_COMM|PMI[2X]?)_\w+|MPI_LOCALN?RANK\w+|FLOWMASK_(?:PARENT|MEET|LISTENER)"
)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The STOP_SIGNALS that this process should handle; call it before handlers are set.

    SIGHUP stays ignored if it was ignored at the start, as by nohup. SIGINT does not: shells ignore it for background
    commands of a script, but a SIGINT sent to the process is intended.
    """
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if number != signal.SIGHUP or not nohup)


def is_of_a_group(variable: str) -> bool:
    """Whether a variable of the environment gives the rank of this process in a group, or the rendezvous."""
    return _OF_A_GROUP.fullmatch(variable) is not None


def forget_group() -> None:
    """Remove another launcher's variables from the environment: a command is not one of its processes."""
    for name in filter(is_of_a_group, list(os.environ)):
        del os.environ[name]


def python_module(module: str, *words: object) -> list[str]:
    """The command that runs a FlowMask module with this Python.

    `-P`: without the working folder on the path, because a user's `yaml.py` there would be imported as the library.
    """
    return [sys.executable, "-P", "-m", module, *map(str, words)]


@contextmanager
def compiling_later() -> Iterator[None]:
    """Inside the block, `torch.compile` returns at once, and a function is compiled when it is first called.

    Libraries decorate functions that FlowMask never calls, and each such import would load torch's compiler.
    """
    import torch

    compile_now = torch.compile

    def later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return partial(later, **options)
        compiled = cache(lambda: compile_now(function, **options))

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return call

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Inside the block, packages that are not imported yet cannot be found, as if they were not installed.

    A library that is imported there does not import them for features that FlowMask does not use.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: the import system's own mark
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class Owner(BaseModel):
    """The owner of a lease: enough to know, on the same host only, whether the process still runs."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: str
    machine: str  # /etc/machine-id: hosts may share a name
    boot: str  # of this start of the kernel; "" if the system has none; then other processes' state is unknown
    namespace: str  # in another one (a container) the same pid is another process
    pid: int = Field(gt=0, lt=2**31)
    started: int  # clock ticks after boot: distinguishes a process from a later one with the same pid
    lease_s: float = Field(gt=0)

    def is_here(self) -> bool:
        """True if it is, or was, a process of this host and pid namespace."""
        here = _here()
        return bool(here.boot) and (self.boot, self.namespace) == (here.boot, here.namespace)

    def is_dead(self) -> bool:
        """True if certainly ended; False if alive, or unknown on this host."""
        here = _here()
        if not here.boot or self.namespace != here.namespace:
            return False
        if self.boot != here.boot:  # the same host, but rebooted since
            return bool(here.machine) and (self.host, self.machine) == (here.host, here.machine)
        try:
            os.kill(self.pid, 0)  # unlike /proc, also correct if other users' processes are hidden
        except ProcessLookupError:
            return True
        except OSError:
            pass
        process = _process(self.pid)
        return process is not None and (process[0] in "ZXx" or process[1] != self.started)


def process_here(pid: int, *, lease_s: float = DEFAULT_LEASE_S) -> Owner:
    """The identity of a process of this host and pid namespace."""
    process = _process(pid)
    started = process[1] if process else 0
    return _here().model_copy(update={"pid": pid, "started": started, "lease_s": lease_s})


@cache
def _here() -> Owner:
    """This host and pid namespace; `this_worker` fills in the process."""
    return Owner(
        host=socket.gethostname(),
        machine=_first_line("/etc/machine-id"),
        boot=_first_line("/proc/sys/kernel/random/boot_id"),
        namespace=_link("/proc/self/ns/pid"),
        pid=1,
        started=0,
        lease_s=DEFAULT_LEASE_S,
    )


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 - "pid:[4026531836]" is no path
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process of this namespace; None if /proc does not show it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
