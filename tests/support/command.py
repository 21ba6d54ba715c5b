"""The command `flowmask` in a separate process, as a user runs it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from forks import start_fork

Main = Callable[[list[str]], Any]


def flowmask(*words: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command in a forked process, which need not import anything, and wait for it."""
    given = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, name) for name in ("stdout", "stderr")]
        process = start_fork(_run, _flowmask, given, files, environment=environment())
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["flowmask", *given], timeout_s, *(file.read_text() for file in files))
        return subprocess.CompletedProcess(
            ["flowmask", *given], process.exitcode, *(file.read_text() for file in files)
        )


def _run(main: Main, words: list[str], files: list[Path]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    for number, file in enumerate(files, start=1):
        with file.open("a") as opened:
            os.dup2(opened.fileno(), number)
    main(words)


def _flowmask(words: list[str]) -> None:
    from flowmask.launch.cli.main import command

    sys.argv = ["flowmask", *words]
    command()


class Started:
    """A command in a forked process; what tests need of subprocess.Popen, with both outputs in one file.

    main: what runs with the words, `flowmask` by default; variables: more for its environment
    """

    def __init__(
        self, words: Sequence[str], *, main: Main = _flowmask, variables: Mapping[str, str] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()  # deleted with this object
        self._words, self._said = words, Path(self._folder.name, "said")
        variables = environment() | dict(variables or {})
        self._process = start_fork(_run, main, list(words), [self._said] * 2, environment=variables)
        self.pid = int(self._process.pid)

    @property
    def returncode(self) -> Any:
        return self._process.exitcode

    def poll(self) -> Any:
        """The exit code, or minus the signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(["flowmask", *self._words], timeout or 0)
        return int(self.returncode)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it printed, after its end."""
        self.wait(timeout)
        return self._said.read_text(), None

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # gone, and its end is not known here yet
            if self.returncode is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_flowmask(*words: object) -> Started:
    """Start the command and return at once."""
    return Started([str(word) for word in words])


def start_python(*words: object) -> subprocess.Popen[str]:
    """Start the command in a Python of its own, whose ranks are such too, and return at once."""
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
