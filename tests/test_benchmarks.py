"""The benchmark of a training step runs at tiny size, gives its figures, and writes its table in place of the last."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_training_benchmark_measures_every_way_and_writes_its_table(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- train_step: begin -->\nold\n<!-- train_step: end -->\nafter\n")
    command = [sys.executable, "benchmarks/train_step.py", "--preset", "tiny", "--json", "--no-mlflow"]
    command += ["--rounds", "1", "--steps", "1", "--table", str(page), "--checkpointing", "none", "selective"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found[way] > 0 for way in ("bare", "bare_torch", "trainer", "on_the_fly", "peak_memory_gib"))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 1 | none |" in text and "| 1 | selective |" in text
