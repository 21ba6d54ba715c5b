"""Shared by the tests of launches on this machine."""

from pathlib import Path

import pytest
from runs import make_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan and a finished cache."""
    folder = tmp_path_factory.mktemp("lab")
    make_lab(folder)
    return folder
