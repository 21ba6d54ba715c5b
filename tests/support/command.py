"""The command `flowmask` as a person runs it: a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def flowmask(*words: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does, in a process of its own."""
    command = [sys.executable, "-m", "flowmask", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment())


def start_flowmask(*words: object) -> subprocess.Popen[str]:
    """Start the command and return at once."""
    command: Sequence[str] = [sys.executable, "-m", "flowmask", *(str(word) for word in words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells have background jobs ignore it
    )


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
