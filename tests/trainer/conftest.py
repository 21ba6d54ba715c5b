"""Process groups that the trainer's tests share, since the start of a group costs more than the tests' work."""

from pathlib import Path
from typing import Any

import pytest
import torch

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="session")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the checkpoints that the two processes of `two_ranks` save."""
    return tmp_path_factory.mktemp("two_ranks") / "saved"


@pytest.fixture(scope="session")
def two_ranks(saved_by_two: Path) -> list[dict[str, Any]]:
    """All results of two real processes, by rank."""
    from workers import run_ranks

    arguments = {"folder": str(saved_by_two)}
    where = saved_by_two.parent
    return run_ranks(2, SUPPORT / "scenarios.py", "group", folder=where, timeout_s=500, arguments=arguments)


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same trainings in one process, without a launcher."""
    from scenarios import trajectories

    torch.set_num_threads(1)
    folder = str(tmp_path_factory.mktemp("one_rank"))
    return trajectories(folder=folder, micros=[1, 2, 4], resume=False, stages=(1,))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `wan` (a tiny Wan) and `cache` (16 examples of two shapes) for the tests of whole runs."""
    from runs import make_lab

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lab")
    make_lab(folder)
    return folder
