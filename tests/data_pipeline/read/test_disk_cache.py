"""Laws of the cache on a node's disk: never over its limit, whole files only, also after kills."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from trials import SEED, TRIALS

from flowmask.data_pipeline.read import disk_cache
from flowmask.data_pipeline.read.disk_cache import DiskCache
from flowmask.models.errors import CacheError

DRAWS = 20 * TRIALS

BLOCK = 4096


def stored(cache: DiskCache) -> int:
    """Bytes that the files take, while no process adds any."""
    with cache._counting():
        return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in cache.folder.iterdir() if path.name != "locks")


def content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def read(cache: DiskCache, name: str, size: int) -> bytes | None:
    memory = memoryview(bytearray(size))
    return bytes(memory) if cache.read(name, [memory[: size // 2], memory[size // 2 :]]) else None


def use(cache: DiskCache, *, seed: int, operations: int) -> None:
    """Random work. The limit holds after each part, and reads give the written bytes."""
    draw = random.Random(seed)
    for _ in range(operations):
        number = draw.randrange(40)
        name, size = f"file-{number}", 1 + 977 * number
        if draw.random() < 0.1:
            cache.drop(name)
        elif (found := read(cache, name, size)) is None:
            cache.put({name: [content(name, size)[:7], content(name, size)[7:]]})
        else:
            assert found == content(name, size)
        assert stored(cache) <= cache.limit


@pytest.mark.parametrize("trial", range(DRAWS))
def test_the_folder_never_takes_more_than_its_limit(tmp_path: Path, trial: int) -> None:
    limit = random.Random(SEED + trial).randrange(0, 60 * BLOCK)
    use(DiskCache(tmp_path, limit=limit), seed=SEED + trial, operations=80)


def test_nor_do_threads_and_processes_together(tmp_path: Path) -> None:
    """Each thread has a separate cache object with separate locks, as a process has."""
    code = (
        "import sys; sys.path[:0] = sys.argv[3:]; from pathlib import Path; import test_disk_cache as laws; "
        "laws.use(laws.DiskCache(Path(sys.argv[1]), limit=30 * 4096), seed=int(sys.argv[2]), operations=150)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    others = [subprocess.Popen([*command, str(seed), str(Path(__file__).parent), *sys.path]) for seed in (1, 2)]
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            use(DiskCache(tmp_path, limit=30 * BLOCK), seed=seed, operations=150)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and [other.wait() for other in others] == [0, 0]
    assert stored(DiskCache(tmp_path, limit=30 * BLOCK)) <= 30 * BLOCK


def test_what_was_used_last_stays_and_what_is_held_too(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit=8 * BLOCK)
    for number in range(8):
        cache.put({f"{number}": [b"x" * BLOCK]})
        os.utime(tmp_path / f"{number}", (number, number))
    held = cache.hold("1")
    os.utime(tmp_path / "1", (1, 1))
    assert held is not None and read(cache, "0", BLOCK)
    cache.put({"new": [b"y" * 2 * BLOCK]})
    assert {path.name for path in tmp_path.iterdir()} == {"locks", "0", "1", "4", "5", "6", "7", "new"}
    os.close(held)


def test_a_smaller_limit_and_lost_counts_hold_from_the_next_start_on(tmp_path: Path) -> None:
    DiskCache(tmp_path, limit=9 * BLOCK).put({str(n): [b"x" * BLOCK] for n in range(9)})
    (tmp_path / "locks").unlink()
    (tmp_path / "writing").write_bytes(b"half of a file, of a process that was killed")
    assert stored(DiskCache(tmp_path, limit=4 * BLOCK)) <= 4 * BLOCK


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"cut"), lambda path: os.truncate(path, 9000)])
def test_a_file_of_another_size_is_none_and_goes(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    cache = DiskCache(tmp_path, limit=9 * BLOCK)
    cache.put({"a": [b"x" * 5000]})
    damage(tmp_path / "a")
    assert read(cache, "a", 5000) is None and not (tmp_path / "a").exists()
    cache.put({"a": [b"z" * 5000]})
    assert read(cache, "a", 5000) == b"z" * 5000


def fetched(cache: DiskCache, names: list[str], there: set[str]) -> list[str]:
    """The names that `once` fetches."""
    asked: list[str] = []

    def fetch(some: list[str]) -> None:
        asked.extend(some)
        there.update(some)

    cache.once(names, ready=there.__contains__, fetch=fetch)
    return asked


def test_a_killed_process_keeps_nobody_waiting(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flowmask.data_pipeline.read.disk_cache import DiskCache; "
        "cache = DiskCache(Path(sys.argv[1]), limit=1); "
        "cache.once(['a'], ready=lambda _: False, fetch=lambda _: (print('mine', flush=True), sys.stdin.read()))"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "mine\n"
    cache, there = DiskCache(tmp_path, limit=1), set[str]()
    got: list[str] = []
    waits = threading.Thread(target=lambda: got.extend(fetched(cache, ["a", "b"], there)))
    waits.start()
    while "b" not in there:  # a free name does not wait for a claimed one
        waits.join(0.01)
    assert got == [] and waits.is_alive()
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    waits.join()
    assert got == ["b", "a"]


def test_a_process_that_hangs_is_waited_for_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "_PATIENCE_S", 0.05)
    with DiskCache(tmp_path, limit=1)._claimed(["a"]) as claimed:
        assert claimed == {"a"}
        assert fetched(DiskCache(tmp_path, limit=1), ["a"], set()) == ["a"]


def test_a_folder_that_cannot_be_used_is_one_line_with_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"data\.local_cache: .*file/host cannot be used \(Not a directory\); free"):
        DiskCache(tmp_path / "file" / "host", limit=1)
    monkeypatch.setattr(disk_cache.os, "geteuid", lambda: 12345)
    with pytest.raises(CacheError, match=r"data\.local_cache: .*belongs to another user"):
        DiskCache(tmp_path / "folder", limit=1)
