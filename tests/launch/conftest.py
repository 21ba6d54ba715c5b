"""One smoke demo for all tests of the command line: every stage really ran, on real files."""

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
