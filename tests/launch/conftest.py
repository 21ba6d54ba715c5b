"""One smoke demo for all tests of the command line: every stage really ran, on real files."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def flowmask(*words: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does, in a process of its own."""
    command = [sys.executable, "-m", "launch", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment())


def start_flowmask(*words: object) -> subprocess.Popen[str]:
    """Start the command and return at once."""
    command: Sequence[str] = [sys.executable, "-m", "launch", *(str(word) for word in words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `flowmask demo --smoke`."""
    out = tmp_path_factory.mktemp("demo") / "smoke"
    done = flowmask("demo", "--smoke", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out
