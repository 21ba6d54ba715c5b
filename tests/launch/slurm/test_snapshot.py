"""The code of a queued job is frozen at its submission, and contains no secret."""

import json
import sys
from pathlib import Path

import pytest

from flowmask.launch.slurm import snapshot

ROOT = Path(__file__).parents[3]


def test_a_snapshot_holds_the_code_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "abc123abc123")
    monkeypatch.setenv("TRACKING", "https://me:abc123abc123@example.org")
    monkeypatch.setenv("NOBODY_KNOWS", "abc123abc123")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = snapshot.freeze(tmp_path)
    for room in ("models", "data_pipeline", "trainer", "launch"):
        ours = {path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py")}
        assert ours == {path.relative_to(code / "flowmask") for path in (code / "flowmask" / room).rglob("*.py")}
    written = "".join(path.read_text() for path in tmp_path.glob("*.*"))
    assert "abc123abc123" not in written
    assert '"OMP_NUM_THREADS": "1"' in written and '"torch"' in written


def test_of_two_copies_of_a_package_the_imported_one_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version in (("first", "1.0"), ("second", "2.0")):
        info = tmp_path / folder / f"pair-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pair\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), *sys.path, str(tmp_path / "second")])
    out = tmp_path / "run"
    out.mkdir()
    snapshot.freeze(out)
    assert json.loads((out / snapshot.PROVENANCE).read_text())["packages"]["pair"] == "1.0"
