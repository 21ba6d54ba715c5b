"""Locks of folders: one holder, free when it is gone, and a question about the lock blocks nobody."""

import errno
import os
import threading
from pathlib import Path

import pytest

from flowmask.models.folders import locks


def test_one_holds_it_until_it_lets_go(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not locks.is_held(path)
    handle = locks.take(path)
    assert handle is not None and locks.is_held(path)
    assert locks.take(path, patience_s=0) is None
    os.close(handle)
    assert not locks.is_held(path)


def test_asking_never_keeps_anybody_out(tmp_path: Path) -> None:
    path, over = tmp_path / ".lock", threading.Event()
    path.touch()

    def ask() -> None:
        while not over.is_set():
            locks.is_held(path)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        for _ in range(20):
            handle = locks.take(path, patience_s=20)
            assert handle is not None
            os.close(handle)
    finally:
        over.set()
        asker.join()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line_and_nobody_holds_one_there(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    path = tmp_path / ".lock"
    path.touch()
    assert not locks.is_held(path)
    with pytest.raises(locks.LockError, match=f"^{path} can't be locked .* file system at /.* has no flock") as refused:
        locks.take(path)
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(locks.fcntl, "flock", lambda *_: os.close(-1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        locks.take(path)
