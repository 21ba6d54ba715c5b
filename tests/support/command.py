"""The command `flowmask` in a separate process, as a user runs it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from forks import start_fork


def flowmask(*words: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command in a forked process, which need not import anything, and wait for it."""
    given = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, name) for name in ("stdout", "stderr")]
        process = start_fork(_main, given, files, environment=environment())
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["flowmask", *given], timeout_s, *(file.read_text() for file in files))
        return subprocess.CompletedProcess(
            ["flowmask", *given], process.exitcode, *(file.read_text() for file in files)
        )


def _main(words: list[str], files: list[Path]) -> None:
    from flowmask.launch.cli.main import command

    for number, file in enumerate(files, start=1):
        with file.open("w") as opened:
            os.dup2(opened.fileno(), number)
    sys.argv = ["flowmask", *words]
    command()


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
