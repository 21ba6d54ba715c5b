"""A study on a real SLURM: all of its rows are submitted at once, and its page shows the finished part."""

import json
from pathlib import Path

import pytest
from cluster import Cluster
from command import flowmask
from study_lab import write_study

PATIENCE_S = 900


@pytest.mark.long
def test_a_study_is_submitted_at_once_and_the_same_command_shows_it_when_it_is_done(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = ("reproduce", write_study(tmp_path), "launch.cluster=slurm", "launch.gpus_per_node=0")
    out = tmp_path / "study"
    first = flowmask(*words, "--no-wait", timeout_s=PATIENCE_S)  # except the world, which runs first
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("submitted job") == 2 + 5, first.stderr
    assert "evaluations are missing" in (out / "study.html").read_text()
    done = flowmask(*words, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "all 6 stages are done" in done.stderr and "submitted job" not in done.stderr
    figures = json.loads((out / "study.json").read_text())
    assert all(len(row["by_seed"]) == row["seeds_wanted"] == 1 for row in figures)
