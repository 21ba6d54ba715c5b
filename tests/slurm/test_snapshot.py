"""A queued job runs the code at its submission; later changes of the checkout have no effect."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cluster import Cluster

from flowmask.launch.slurm.submission import Submission
from flowmask.trainer.state.provenance import PACKAGE


def test_editing_the_checkout_does_not_change_a_queued_job(cluster: Cluster, lab: Path, tmp_path: Path) -> None:
    checkout, out = tmp_path / "checkout", tmp_path / "cache"
    shutil.copytree(PACKAGE, checkout / "flowmask", ignore=shutil.ignore_patterns("__pycache__"))
    words = [
        lab / "cache.yaml",
        f"out={out}",
        "cache.views=1",
        "launch.cluster=slurm",
        "launch.sbatch_args.begin=now+1hour",
    ]
    sent = subprocess.run(
        [sys.executable, "-m", "flowmask", "submit", *map(str, words)],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert sent.returncode == 0, sent.stderr
    for source in checkout.rglob("*.py"):
        source.write_text("raise SystemExit('the job reads the checkout')\n")
    submission = Submission.latest(out)
    assert submission is not None
    job, _ = submission.slurm()
    cluster.start_now(job)
    cluster.wait_for_state(job, "COMPLETED", "FAILED", timeout_s=180)
    assert cluster.job_state(job) == "COMPLETED", submission.log_tail()
    assert (out / "manifest.json").exists()
