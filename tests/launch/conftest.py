"""What tests of the command line share: one smoke demo, and commands that do not outlive a test."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import flowmask


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `flowmask demo --smoke`."""
    out = tmp_path_factory.mktemp("demo") / "smoke"
    done = flowmask("demo", "--smoke", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that a test starts here do not outlive it."""
    commands: list[subprocess.Popen[str]] = []
    yield commands
    for command in commands:
        command.kill()
        command.wait()


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process that a test starts computes in one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
