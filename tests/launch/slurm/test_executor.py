"""Which failures of sbatch leave no job: only then may the files of a submission go."""

from pathlib import Path

import pytest

from flowmask.launch.launch_config import LaunchConfig
from flowmask.launch.slurm.executor import NotTakenError, submit
from flowmask.launch.slurm.submission import Submission
from flowmask.models.errors import ConfigError


@pytest.mark.parametrize(
    ("said", "code", "error"),
    [
        ("sbatch: error: Batch job submission failed: Invalid account", 1, NotTakenError),
        ("sbatch: fatal: Could not establish a configuration source", 1, NotTakenError),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 1, ConfigError),
        ("a banner in place of a job id", 0, ConfigError),
    ],
)
def test_a_failure_is_told_from_a_job_that_may_be_queued(
    said: str, code: int, error: type[ConfigError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\necho '{said}'\necho '{said}' >&2\nexit {code}\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    submission = Submission.create(tmp_path / "run", kind="train", resolved={})
    launch = LaunchConfig(cluster="slurm", cpus_per_node=1, gpus_per_node=0)
    with pytest.raises(ConfigError) as caught:
        submit(submission, launch, name="x", code=tmp_path)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    submission.forget()
    assert not (tmp_path / "run" / "launch").exists()
