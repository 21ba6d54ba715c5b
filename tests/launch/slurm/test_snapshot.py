"""The code of a queued job is frozen at its submission, and contains no secret."""

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
