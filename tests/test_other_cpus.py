"""The laws about numbers hold on CPUs with fewer instructions: torch and oneDNN then sum in another order."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {"avx2": "AVX2", "default": "SSE41"}  # ATEN_CPU_CAPABILITY: DNNL_MAX_CPU_ISA
NUMERIC = (
    "tests/models/decoders",
    "tests/models/test_attention.py",
    "tests/models/test_dit.py",
    "tests/models/test_flow.py",
    "tests/models/test_lora.py",
    "tests/models/test_mask_decoder.py",
    "tests/models/test_segment.py",
    "tests/models/test_text.py",
    "tests/models/test_vae.py",
    "tests/test_parity.py",
    "tests/data_pipeline/clip/test_pixels.py",
    "tests/data_pipeline/test_randomness.py",
    "tests/trainer/step/test_engine.py",
    "tests/trainer/objectives/test_objectives.py",
    "tests/trainer/step/test_optimizer8bit.py",
    "tests/trainer/step/test_ranks.py",
    "tests/trainer/step/test_sequence_parallel.py",
)


@pytest.mark.long
@pytest.mark.parametrize("level", LEVELS)
def test_the_laws_about_numbers_hold_on_other_cpus(level: str, tmp_path: Path) -> None:
    variables = os.environ | {"ATEN_CPU_CAPABILITY": level, "DNNL_MAX_CPU_ISA": LEVELS[level]}
    run_tests(NUMERIC, variables, tmp_path / "tests")


@pytest.mark.long
def test_cpus_that_share_a_folder_of_compiled_programs_do_not_run_each_others(tmp_path: Path) -> None:
    """For nodes that share a home. A program for narrow vectors writes beyond its ends when run with wider ones."""
    compiled = ("tests/models/test_dit.py::test_compiled_blocks_compute_what_the_others_do",)
    for level in ("avx2", None):
        variables = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
        run_tests(compiled, variables | ({"ATEN_CPU_CAPABILITY": level} if level else {}), tmp_path / "tests")


def run_tests(tests: Sequence[str], variables: Mapping[str, str], scratch: Path) -> None:
    """Run the short tests in a separate process."""
    pytest_here = [sys.executable, "-m", "pytest", "-m", "not long", "-p", "no:cacheprovider", "--show-capture=no"]
    command = [*pytest_here, "--basetemp", str(scratch), *tests]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
