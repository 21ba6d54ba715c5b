"""The command `flowmask` in a separate process, as a user runs it."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def flowmask(*words: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process and wait for it."""
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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells let background jobs ignore SIGINT
    )


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
