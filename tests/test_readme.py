"""The README is short. It and the map in docs/architecture.md describe the tree correctly."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAP = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = ("models", "data_pipeline", "trainer", "launch")
FOLDERS = sorted(path.parent for room in ROOMS for path in (ROOT / room).rglob("__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_map_names_every_folder(folder: Path) -> None:
    wanted = f"`{folder.name}`" if folder.parent == ROOT else f"{folder.name}/`"
    assert wanted in MAP


def test_the_readme_fits_on_two_screens_and_shows_a_result() -> None:
    picture = re.search(r"!\[.+\]\((docs/images/\S+)\)", README)
    assert len(README.splitlines()) <= 120 and picture is not None
    assert (ROOT / picture[1]).stat().st_size < 150_000


def test_every_config_that_the_readme_names_exists() -> None:
    named = {word.strip("`,.;)") for word in README.split() if word.startswith(("configs/", "`configs/"))}
    for name in named - {"configs/"}:
        assert (ROOT / name.strip("`")).is_file(), name


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "test-long", "docs", "lint", "setup"):
        assert f"\n{target}:" in makefile
