"""A user recognises their own marks; nobody else can make them, and a check writes no file."""

import multiprocessing
from pathlib import Path

import pytest
from trials import TRIALS

from flowmask.models.safe.signature import is_ours, signature


def test_a_mark_is_of_these_words_and_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "one"))
    assert not is_ours("0" * 64, "a", "b") and not tmp_path.joinpath("one").exists()
    mark = signature("a", "b")
    assert is_ours(mark, "a", "b") and mark == signature("a", "b")
    assert not any(is_ours(mark, *words) for words in (("ab",), ("a", "b", ""), ("a', 'b",), ("b", "a")))
    assert not any(is_ours(strange, "a", "b") for strange in ("", None, 1, ["a"], "é", mark[:-1]))
    key = tmp_path / "one" / "flowmask" / "key"
    assert key.stat().st_mode & 0o777 == 0o600 and list(key.parent.iterdir()) == [key]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "two"))
    assert not is_ours(mark, "a", "b") and signature("a", "b") != mark


@pytest.mark.parametrize("content", [b"", b"short"])
def test_where_no_key_can_be_kept_nothing_is_ours(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "flowmask").mkdir()
    (tmp_path / "flowmask" / "key").write_bytes(content)
    assert signature("a") == "" and not is_ours("", "a")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert signature("a") == "" and not is_ours("", "a")


def _sign(_: int) -> str:
    return signature("word")


def test_processes_that_start_at_once_have_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for trial in range(3 * TRIALS):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / str(trial)))
        with multiprocessing.get_context("fork").Pool(8) as pool:
            assert len(set(pool.map(_sign, range(32)))) == 1
