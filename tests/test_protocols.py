"""Our protocols give every number of the golden sets, which the benchmarks' own public code computed.

FLOWMASK_PROTOCOLS_DIR names another set of the same layout. tests/golden/protocols/README.md gives the sources.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from protocol_sets import COMPUTED, leaves, load

OWN = Path(__file__).parent / "golden" / "protocols"
ROOT = Path(os.environ.get("FLOWMASK_PROTOCOLS_DIR", OWN))
TOLERANCE = 1e-7  # float64 sums in another order
FLOAT32 = 1e-6  # the public code sums these numbers in float32
NUMBERS = [
    (name, path, value)
    for name in sorted(COMPUTED)
    for path, value in leaves(json.loads((ROOT / name / "expected.json").read_text())).items()
]


@cache
def ours(name: str) -> dict[str, Any]:
    """Our results for a set, computed once."""
    return leaves(COMPUTED[name](*load(ROOT / name)))


@pytest.mark.parametrize(("name", "path", "value"), NUMBERS, ids=[f"{name}/{path}" for name, path, _ in NUMBERS])
def test_a_number_is_that_of_the_public_code(name: str, path: str, value: float | str) -> None:
    found = ours(name)[path]
    if isinstance(value, str):
        assert found == value
    else:
        assert found == pytest.approx(value, rel=0, abs=FLOAT32 if path.startswith("sa2va") else TOLERANCE)


def test_every_protocol_that_computes_numbers_has_a_set() -> None:
    assert {folder.name for folder in ROOT.iterdir() if (folder / "inputs.npz").exists()} == set(COMPUTED)
