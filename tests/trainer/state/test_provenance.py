"""The running code is identified in a checkout and in its snapshot; elsewhere it is unknown, which is no error."""

import json
import subprocess
from pathlib import Path

import pytest

from flowmask.trainer.state import provenance


def test_the_commit_is_read_and_its_absence_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.git_commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    commit = provenance.git_commit()
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert provenance.git_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_commit() == "unknown"


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"commit": "f" * 40, "changed": False}, "f" * 40),
        ({"commit": "f" * 40, "changed": True}, "f" * 40 + "-dirty"),
        ({"commit": None, "changed": False}, "unknown"),
        ("damaged", "unknown"),
    ],
)
def test_a_submitted_job_knows_the_commit_that_its_snapshot_was_taken_from(
    facts: object, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "code")
    (tmp_path / provenance.PROVENANCE).write_text(json.dumps(facts))
    assert provenance.git_commit() == told
