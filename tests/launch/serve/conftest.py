"""Weights and films for the page."""

import os
from pathlib import Path

import pytest
from film import write_film
from golden_export import write_golden_export


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and films of 0.9, 1.2 and 2.1 s."""
    folder = tmp_path_factory.mktemp("lab")
    write_golden_export(folder)
    for frames in (9, 12, 21):
        write_film(folder / f"film{frames}.mp4", frames=frames)
    (folder / "clips").mkdir()
    os.link(folder / "film9.mp4", folder / "clips" / "given.mp4")
    return folder
