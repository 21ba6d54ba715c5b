"""The parity tests notice every single wrong number: a set with one number off by ten tolerances fails."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from parity.cases import CASES
from parity.core import collect
from parity.perturb import Target, perturbed, record_targets, tensor_targets
from trials import SEED, TRIALS

ROOT = Path(__file__).parent / "golden" / "parity"
TARGETS = [*tensor_targets(ROOT), *record_targets(ROOT)]


def sampled() -> list[Target]:
    """One target of each file."""
    rng = random.Random(SEED)
    return [rng.choice([t for t in TARGETS if t.file == file]) for file in sorted({t.file for t in TARGETS})]


def fails(root: Path, case: str) -> bool:
    """Whether any check of a case fails on a set; it stops at the first failure."""
    chosen = {name: checks for name, checks in CASES.items() if name.startswith(case)}
    for check in collect(root, chosen):
        try:
            check.run()
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("target", sampled(), ids=lambda t: t.file)
def test_a_number_off_by_ten_tolerances_is_noticed_in_every_file(target: Target, tmp_path: Path) -> None:
    what = perturbed(ROOT, target, tmp_path / "set", random.Random(SEED))
    assert fails(tmp_path / "set", target.case), what


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.file}:{t.name}")
def test_a_number_off_by_ten_tolerances_is_noticed_in_every_tensor_and_record(target: Target, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    for trial in range(TRIALS):
        what = perturbed(ROOT, target, tmp_path / f"set{trial}", rng)
        assert fails(tmp_path / f"set{trial}", target.case), what


@pytest.mark.parametrize("file", sorted({t.file for t in TARGETS}))
def test_a_set_that_lacks_a_file_fails(file: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    perturbed(ROOT, next(t for t in TARGETS if t.file == file), root, random.Random(SEED))
    (root / file).unlink()
    assert fails(root, file.split("/")[0])
    assert fails(root, "manifest")


def test_pytest_itself_fails_on_such_a_set_in_the_folder_that_the_environment_names(tmp_path: Path) -> None:
    target = next(t for t in TARGETS if t.file == "resize/table.json")
    perturbed(ROOT, target, tmp_path / "set", random.Random(SEED))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_parity.py", "-k", "resize", "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "FLOWMASK_PARITY_DIR": str(tmp_path / "set")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1 and "1 failed" in ran.stdout, ran.stdout[-2000:]
