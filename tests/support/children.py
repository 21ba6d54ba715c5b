"""Child processes of a forked process, without the imports that a new Python would repeat.

Only ranks, trials and senders to MLflow: they are children of a command that `forks.py` started, and their real start
is tested by the commands of `command.start_python`, by SLURM, and by tests/launch/test_start_up.py.
"""

import atexit
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

FORKED = (
    *("flowmask.launch.local.worker", "flowmask.launch.tune.worker", "flowmask.trainer.track.sender"),
    "bare_ranks",  # beside this file
)


class Popen(subprocess.Popen[Any]):
    """As subprocess.Popen; `python -P -m MODULE` of FORKED is a fork of this process that runs the module."""

    def __init__(
        self, args: Sequence[str], *, env: Mapping[str, str] | None = None, pass_fds: Collection[int] = (), **named: Any
    ) -> None:
        if tuple(args[:3]) == (sys.executable, "-P", "-m") and args[3] in FORKED:
            named["preexec_fn"] = partial(_become, list(args[3:]), dict(os.environ if env is None else env), pass_fds)
        super().__init__(args, env=env, pass_fds=pass_fds, **named)


def _become(words: list[str], environment: dict[str, str], kept: Collection[int]) -> None:
    """Run in the child in place of a program, and never return."""
    import torch

    first = 3
    for descriptor in sorted(kept):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))  # the parent waits for the last of them
    os.environ.clear()
    os.environ.update(environment)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    atexit._clear()
    torch.set_num_threads(1)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    os._exit(0)
