"""The GPU script, run on the CPU: it gives every kind of row, and loses no measured row."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from gpu import forwards, rows, steps, worker  # noqa: E402
from gpu.__main__ import measure  # noqa: E402
from gpu.journal import Journal, tables  # noqa: E402
from gpu.lab import shares  # noqa: E402
from gpu.scale import REAL, TINY  # noqa: E402

MISSING = {"mlflow", "decord", "av", "submitit", "pandas", "webdataset", "pytest"}  # treated as missing in any case
# A worker of two rows: it ends in the first as the test says, and the next worker measures the second.
STUB = """
import os, sys, time
from pathlib import Path
from gpu.journal import Journal
journal = Journal(Path(sys.argv[1]))
done = [row["row"] for row in journal.rows()]
if not done:
    journal.plan([("a", "a first"), ("a", "a second"), ("b", "b third")])
    journal.add("a first", kind="a", seconds=1.0)
if "a second" not in done:
    journal.begin("a second", kind="a", at_s=time.monotonic(), limit_s=float(sys.argv[3]))
    exec(sys.argv[2])
journal.add("b third", kind="b", seconds=2.0)
"""


def stub(out: Path, ending: str, *, limit_s: float = 60) -> list[str]:
    return [sys.executable, "-c", STUB, str(out), ending, str(limit_s)]


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH of the processes that a test starts."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]))


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name: str, found: set[str]) -> set[str]:
    """A package and all packages that it requires."""
    if plain(name) not in found:
        with suppress(metadata.PackageNotFoundError):
            listed = metadata.distribution(name).requires or []
            found.add(plain(name))
            for line in listed:
                if "extra ==" not in line:
                    needed(re.split(r"[ ;<>=!~\[(]", line)[0], found)
    return found


def out_of_reach() -> list[str]:
    """Modules of installed packages that neither the wheels hold nor torch, transformers or safetensors need."""
    script = (ROOT / "benchmarks" / "gpu_wheels.sh").read_text()
    carried = re.search(r"names='([^']*)'", script)
    assert carried is not None
    there = {plain(name) for name in (*carried[1].split(), "deepspeed", "flowmask")}
    for name in ("torch", "transformers", "safetensors"):
        needed(name, there)
    listing = "import json; from importlib import metadata; print(json.dumps(metadata.packages_distributions()))"
    # Asked in a new process: one that has imported setuptools finds its private copies of packages, too.
    packages = json.loads(subprocess.check_output([sys.executable, "-c", listing])).items()
    return sorted(MISSING | {name for name, of in packages if name[0] != "_" and not {*map(plain, of)} & there})


def test_what_this_process_has_imported_does_not_change_what_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    before = out_of_reach()
    monkeypatch.setattr(sys, "path", [*sys.path])  # which setuptools lengthens, for the tests after this one too
    importlib.import_module("setuptools")
    assert out_of_reach() == before
    assert not {"setuptools", "jaraco"} & {*before}


@pytest.mark.timeout(3600)  # half a minute on an idle machine
def test_the_whole_script_gives_every_kind_of_row_with_torch_transformers_safetensors_and_the_wheels(
    tmp_path: Path,
) -> None:
    hidden = f"import sys\nfor name in {out_of_reach()}:\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    out, environment = tmp_path / "out", {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    command = ["benchmarks/gpu.sh", str(out), "--tiny", "--device", "cpu", "--seconds", "3000"]
    subprocess.run(command, cwd=ROOT, check=True, env={**environment, "OMP_NUM_THREADS": "1"})
    found = json.loads((out / "results.json").read_text())
    assert [row["row"] for row in found] == [row.name for row in rows.all_rows(TINY)]
    failed = {row["row"]: row["failed"] for row in found if "failed" in row}
    assert not {name: why for name, why in failed.items() if "cudnn" not in name or "needs a GPU" not in why}
    assert not any("\n" in why for why in failed.values())
    for kind, keys in {
        "matrix": {"tflop_per_s"},
        "step": {"step_s", "peak_gb", "planned_tensors_gb", "planned_gpu_gb", "of_matrix_pct"},
        "forward": {"seconds", "peak_gb", "planned_tensors_gb", "of_matrix_pct"},
        "encoder": {"seconds", "largest_difference_pct"},
        "waits": {"waits", "launches"},
        "cache": {"clips_per_s"},
        "evaluate": {"s_per_sentence"},
        "start": {"first_step_s"},
    }.items():
        measured = [row for row in found if row["kind"] == kind and "failed" not in row]
        assert measured and all(row[key] is not None for row in measured for key in keys), kind
    assert (out / "tables.md").read_text() == tables(found)


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "its process was ended by signal 9"),
        ("sys.exit(7)", "its process ended with 7"),
        ("time.sleep(99)", "it took longer than "),
    ],
)
def test_a_row_that_its_process_dies_in_is_a_row_and_the_next_process_goes_on(
    tmp_path: Path, ending: str, reason: str
) -> None:
    limit_s = 0.3 if "sleep" in ending else 60
    code = measure(stub(tmp_path, ending, limit_s=limit_s), Journal(tmp_path), until_s=time.monotonic() + 60)
    found = {row["row"]: row.get("failed", "") for row in Journal(tmp_path).rows()}
    assert code == 0 and list(found) == ["a first", "a second", "b third"]
    assert found.pop("a second").startswith(reason) and not any(found.values())


def test_when_the_time_is_over_the_rows_that_are_left_are_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.plan([("a", "a first"), ("a", "a second"), ("b", "b third")])
    journal.add("a first", kind="a", seconds=1.0)
    journal.begin("a second", kind="a", at_s=time.monotonic(), limit_s=60)
    sleeping = [sys.executable, "-c", "import time; time.sleep(99)"]
    assert measure(sleeping, journal, until_s=time.monotonic() + 0.5) == 0
    first, second, third = Journal(tmp_path).rows()
    assert first["seconds"] == 1 and second["failed"].startswith("it took longer") and third["not_started"]
    assert "No time was left for 1 rows: b third" in (tmp_path / "tables.md").read_text()


def test_a_worker_that_measures_nothing_is_not_started_for_ever(tmp_path: Path) -> None:
    assert measure([sys.executable, "-c", "raise SystemExit(5)"], Journal(tmp_path), until_s=time.monotonic() + 60) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_script_says_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[0].startswith("--device is cuda, but ")


def test_a_script_that_is_killed_leaves_the_rows_that_were_done_and_no_process(tmp_path: Path) -> None:
    command = ["benchmarks/gpu.sh", str(tmp_path), "--tiny", "--device", "cpu"]
    script = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable})
    journal = Journal(tmp_path)
    while not (done := journal.rows()):
        assert script.poll() is None
        time.sleep(0.1)
    (worker,) = psutil.Process(script.pid).children()
    script.kill()
    script.wait()
    worker.wait(timeout=60)
    assert json.loads((tmp_path / "results.json").read_text())[: len(done)] == done
    assert "| here | tiny Wan, 5x32x48 |" in (tmp_path / "tables.md").read_text()


def test_shares_are_of_the_stated_peak_and_of_the_measured_rate() -> None:
    """1 PFLOP in 2 s is 500 TFLOP/s."""
    found = shares(1e15, 2.0, peak_tflops=1000.0, matrix_tflops=625.0)
    assert found == {"tflop_per_s": 500.0, "mfu_pct": 50.0, "of_matrix_pct": 80.0}
    assert shares(1e15, 2.0, peak_tflops=None, matrix_tflops=None)["mfu_pct"] is None


def test_what_a_profile_says_of_a_step_is_counted_by_step() -> None:
    events = [
        steps.Event("cudaStreamSynchronize", 4, 0.0, kernel=False),
        steps.Event("aten::_local_scalar_dense", 2, 0.0, kernel=False),
        steps.Event("cudaLaunchKernel", 100, 0.0, kernel=False),
        steps.Event("aten::mm", 10, 3000.0, kernel=False),  # its time is the time of its kernel
        steps.Event("gemm", 10, 3000.0, kernel=True),
        steps.Event("Memcpy DtoH (Device -> Pinned)", 2, 1000.0, kernel=True),
    ]
    assert steps.of_a_step(events, steps=2, step_s=0.004) == {
        "waits": {"cudaStreamSynchronize": 2.0, "aten::_local_scalar_dense": 1.0},
        "copies": {"Memcpy DtoH (Device -> Pinned)": 1.0},
        "launches": 50.0,
        "gpu_busy_pct": pytest.approx(50.0),
        "kernels_ms": {"gemm": 1.5, "Memcpy DtoH (Device -> Pinned)": 0.5},
    }


def test_the_first_rows_are_a_step_and_each_model_and_have_their_time() -> None:
    found = rows.all_rows(REAL)
    first = [row for row in found if row.first]
    assert found[: len(first)] == first and sum(row.estimate_s for row in first) <= rows.FIRST_S
    assert {row.kind for row in first} == {"machine", "matrix", "step", "forward"}
    assert {row.of.split(",")[0] for row in first if row.kind == "forward"} == set(forwards.MODELS)
    assert len({row.name for row in found}) == len(found)
    ways = {row.of for row in found if row.kind == "step"}
    assert len(ways) == 3 * 2 * 3 * 3 + 2  # recomputation x compilation x attention x batch, and two precisions


class Stand:
    """Replaces a lab: its rows take no time."""

    gpu, scale, matrix_tflops = False, TINY, None

    def clear(self) -> None:
        pass


def test_a_row_that_has_no_time_is_passed_over_and_one_that_raises_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(lab: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    found = [
        rows.Row("a", "full", 1, full),
        rows.Row("a", "long", 1000, lambda lab: {"s": 1.0}),
        rows.Row("matrix", "bf16", 1, lambda lab: {"tflop_per_s": 3.0}),
    ]
    monkeypatch.setattr(rows, "all_rows", lambda scale: found)
    lab: Any = Stand()
    assert worker.measure_rows(lab, Journal(tmp_path), until_s=time.monotonic() + 100) == 0
    measured = {row["row"]: row for row in Journal(tmp_path).rows()}
    assert list(measured) == ["a full", "matrix bf16"] and measured["a full"]["failed"] == "out of memory"
    assert lab.matrix_tflops == 3.0
