"""`make test-long` runs again only the short tests whose cases are drawn."""

from pathlib import Path

from trials import drawn_tests

FILE = """
import pytest
from trials import SEED, TRIALS
FIRST, CASES = 1, range(10 * TRIALS)
def drawn(seed): return seed + SEED
class Lab: seed = SEED
@pytest.fixture
def lab(): return Lab()
@pytest.mark.parametrize("case", CASES)
def test_by_its_parameters(case): ...
def test_by_a_helper(): drawn(1)
def test_by_a_fixture(lab): ...
def test_itself(): print(SEED)
def test_fixed(tmp_path): print(tmp_path)
def test_fixed_too(): undrawn = 1
"""


def test_a_test_is_drawn_by_all_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(FILE)
    found = {name for name in drawn_tests(tmp_path / "file.py") if name.startswith("test_")}
    assert found == {"test_by_its_parameters", "test_by_a_helper", "test_by_a_fixture", "test_itself"}
