"""Many workers of one build around a stub encoder (`benchmarks/stub_build.py`): the bytes of one worker."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def stub_build(out: Path, *, clips: int, workers: int, clips_per_shard: int) -> dict[str, Any]:
    """Build with forked workers, which fail if any of them has imported torch."""
    command = [sys.executable, "benchmarks/stub_build.py", str(out), "--hashes", "--clips", str(clips)]
    command += ["--workers", str(workers), "--clips-per-shard", str(clips_per_shard)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("workers", "clips", "clips_per_shard"),
    [(12, 480, 4), pytest.param(200, 400, 2, marks=pytest.mark.long)],
    ids=["12", "200"],
)
def test_many_workers_build_the_bytes_of_one_which_asks_the_filesystem_less_than_30_times_a_unit(
    tmp_path: Path, workers: int, clips: int, clips_per_shard: int
) -> None:
    one = stub_build(tmp_path / "one", clips=clips, workers=1, clips_per_shard=clips_per_shard)
    many = stub_build(tmp_path / "many", clips=clips, workers=workers, clips_per_shard=clips_per_shard)
    assert many["files"] == one["files"]
    assert one["operations"]["clips"] < 30 * (clips // clips_per_shard)
