"""Shared by the tests of the command line: a smoke demo, a browser, and commands that end with their test."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import NEEDED, browser, why_no_browser
from command import flowmask


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `flowmask demo --smoke`."""
    out = tmp_path_factory.mktemp("demo") / "smoke"
    done = flowmask("demo", "--smoke", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    reason = why_no_browser()
    if reason is not None:
        (pytest.fail if NEEDED else pytest.skip)(reason)
    with browser() as started:
        yield started


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that a test starts; they are killed at its end."""
    commands: list[subprocess.Popen[str]] = []
    yield commands
    for command in commands:
        command.kill()
        command.wait()


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process that a test starts computes in one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
