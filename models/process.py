"""Processes: how ours start and end, and how one is identified from any node that sees its folder."""

import os
import re
import signal
import socket
import sys
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

CRASH_EXIT_CODE = 1
MISTAKE_EXIT_CODE = 2  # a UserError: a person can mend it
REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: stopped on request with everything saved; start the same command again
OVER_EXIT_CODE = 100  # tells a batch script not to start its job again; no other program ends with it
INTERRUPTED_EXIT_CODE = 130  # the shell's code for ^C
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)  # each asks to save and to end
DEFAULT_LEASE_S = 120.0
_OF_A_GROUP = re.compile(  # what torchrun, mpirun, srun's PMI and our own launcher tell the processes of a group
    r"(?:(?:LOCAL|GROUP|NODE|ROLE)_)?(?:RANK|WORLD_SIZE)|MASTER_(?:ADDR|PORT)|"
    r"(?:TORCHELASTIC|OMPI_COMM|PMI[2X]?)_\w+|MPI_LOCALN?RANK\w+|FLOWMASK_(?:PARENT|MEET|LISTENER)"
)


def stop_signals() -> tuple[signal.Signals, ...]:
    """STOP_SIGNALS that this process listens to; asked before it does.

    SIGHUP stays ignored where it was at the start: nohup has said that the end of a session is not meant for it. Not so
    SIGINT, which shells ignore for whatever a script runs with `&`: a SIGINT that is sent is meant.
    """
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if number != signal.SIGHUP or not nohup)


def is_of_a_group(variable: str) -> bool:
    """Whether a variable of the environment says which process of a group this is, or where that group meets."""
    return _OF_A_GROUP.fullmatch(variable) is not None


def forget_group() -> None:
    """Remove another launcher's variables from the environment: a command is none of its processes."""
    for name in filter(is_of_a_group, list(os.environ)):
        del os.environ[name]


def python_module(module: str, *words: object) -> list[str]:
    """The command that runs a module of ours with this Python.

    `-P`: without the working folder on the path, where a file `yaml.py` of the user would be taken for the library.
    """
    return [sys.executable, "-P", "-m", module, *map(str, words)]


class Owner(BaseModel):
    """Who holds a lease: enough to know on the same host, and only there, whether that process still runs."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: str
    machine: str  # /etc/machine-id: hosts of one name are not one host
    boot: str  # of this start of the kernel; "" where the system has none, then nothing is known of other processes
    namespace: str  # in another one (a container) the same pid is another process
    pid: int = Field(gt=0, lt=2**31)
    started: int  # clock ticks after boot: tells a process from a later one of the same pid
    lease_s: float = Field(gt=0)

    def is_here(self) -> bool:
        """True if it is, or was, a process of this host and pid namespace."""
        here = _here()
        return bool(here.boot) and (self.boot, self.namespace) == (here.boot, here.namespace)

    def is_dead(self) -> bool:
        """True if surely ended; False if alive, or not for this host to say."""
        here = _here()
        if not here.boot or self.namespace != here.namespace:
            return False
        if self.boot != here.boot:  # this very host, and it was started again since
            return bool(here.machine) and (self.host, self.machine) == (here.host, here.machine)
        try:
            os.kill(self.pid, 0)  # unlike /proc, right also where other users' processes are hidden
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
    """This host and pid namespace; the process is filled in by `this_worker`."""
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
