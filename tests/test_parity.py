"""Every number of the reference code, at its tolerance: one test per expected tensor or record.

The set is the folder in FLOWMASK_PARITY_DIR, or the one in tests/golden.
"""

import os
from pathlib import Path

import pytest
from parity.cases import CASES
from parity.core import Check, collect

ROOT = Path(os.environ.get("FLOWMASK_PARITY_DIR") or Path(__file__).parent / "golden" / "parity")


@pytest.mark.parametrize("check", collect(ROOT, CASES), ids=lambda check: check.name)
def test_our_code_agrees_with_the_record(check: Check) -> None:
    check.run()
