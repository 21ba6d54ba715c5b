"""The benchmarks run at tiny size, give their figures, and replace their last tables."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copyfile

import numpy as np
import pytest
from trials import SEED

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


def test_two_checkouts_are_compared_in_turns_and_the_other_one_is_removed(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "benchmarks").mkdir(parents=True)
    copyfile(ROOT / "benchmarks" / "against.py", repository / "benchmarks" / "against.py")
    counted = (
        "import json, sys\n"
        'print(json.dumps({"rate": %s, "part": {"s": 2}, "none": 0, "text": "x"} if "--json" in sys.argv else 0))'
    )
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    (repository / "benchmarks" / "loader.py").write_text(counted % 4)
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "older"]):
        subprocess.run([*git, *words], check=True)
    (repository / "benchmarks" / "loader.py").write_text(counted % 3)
    command = [sys.executable, "benchmarks/against.py", "HEAD", "--benchmarks", "loader", "--rounds", "2", "--json"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])["loader"]
    assert {name: figure["ratio"] for name, figure in figures.items()} == {"rate": 0.75, "part.s": 1.0}
    assert figures["rate"] == {"ratio": 0.75, "low": 0.75, "high": 0.75, "here": 3.0, "there": 4.0}
    left = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(left.splitlines()) == 1


@pytest.mark.parametrize("slower", [0.0, 0.1])
def test_a_sleep_in_a_step_stands_out_although_both_checkouts_are_at_times_half_as_fast(
    monkeypatch: pytest.MonkeyPatch, slower: float
) -> None:
    """A sleep changes no count: only times show it. Without a sleep, 95 in 100 intervals should contain 1."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import against

    random, trials, rounds = np.random.default_rng(SEED), 100, 8
    seen = 0
    for _ in range(trials):
        load = random.uniform(1, 2, rounds)  # load of the machine in a round, the same for both
        here, there = ([{"step_s": s} for s in load * random.normal(1 + more, 0.02, rounds)] for more in (slower, 0))
        seen += against.compare(here, there)["step_s"]["low"] > 1
    assert seen >= 0.95 * trials if slower else seen <= 0.15 * trials


@pytest.mark.long
def test_the_benchmarks_of_evaluation_give_their_ratios_and_equal_numbers() -> None:
    found = []
    for words in (
        ["evaluate", "--videos", "1", "--sentences", "2", "--rounds", "1"],
        ["metrics", "--frames", "1", "--rounds", "1"],
    ):
        command = [sys.executable, f"benchmarks/{words[0]}.py", "--json", *words[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    evaluation, metrics = found
    assert all(evaluation[name] > 0 for name in ("naive_s", "ours_s", "ratio", "allowed", "reached"))
    assert evaluation["ratio"] / evaluation["allowed"] == pytest.approx(evaluation["reached"], rel=0.01)
    assert [size["difference"] for size in metrics.values()] == [0, 0]


@pytest.mark.long
def test_the_benchmark_of_mask_decoders_says_what_the_light_one_saves() -> None:
    command = [sys.executable, "benchmarks/mask_decoders.py", "--json", "--clip", "5x16x16", "--rounds", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["share"] < 0.05 and found["light_peak_gb"] < 0.05 * found["vae_peak_gb"]
    assert found["light_cpu_s"] < found["vae_cpu_s"]
