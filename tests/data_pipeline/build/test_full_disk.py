"""The law of a full disk: the build stops in one line, keeps whole files, and ends with the same bytes later."""

import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from build_workers import contents, start_limited

from flowmask.data_pipeline.check.repair import repair
from flowmask.data_pipeline.check.verify import verify


def build_in_a_process(config, *, limit_bytes: int = 0) -> str:
    """The one line of the refusal; empty if the build finished."""
    code, said = start_limited(config, limit_bytes=limit_bytes).finish()
    assert code == bool(said) and "\n" not in said, said
    return said


@pytest.fixture
def small_disk(tmp_path, cache):
    """A function that mounts a disk of the given size for one test; it returns None if mounting is not allowed."""
    place, mounted = tmp_path / "disk", []
    place.mkdir()

    def mount(size: int) -> Path | None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            return None
        mounted.append(place)
        return place

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_in_the_middle_of_a_shard_stops_the_build_and_room_lets_it_finish(
    small_disk, make_config, cache, tmp_path
):
    shards = sorted(path.stat().st_size for path in (cache / "shards").glob("*.tar"))
    disk = small_disk(sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) // 2)
    if disk is None:  # limit file size to two thirds of a shard: the same error at the same place
        config = make_config(tmp_path / "cache")
        said = build_in_a_process(config, limit_bytes=shards[-1] * 2 // 3)
    else:
        config = make_config(disk / "cache")
        said = build_in_a_process(config)
    assert "cannot write" in said and ("No space left" in said or "File too large" in said)
    assert not list(config.out.rglob("*.tar.*")) and not (config.out / "manifest.json").exists()
    if disk is not None:
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
    assert build_in_a_process(config) == ""
    assert contents(config.out) == contents(cache)


def test_a_disk_that_fills_while_a_cache_is_repaired_leaves_it_to_the_next_repair(cache, make_config, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    shard = copy / "shards" / "000001.tar"
    size = shard.stat().st_size
    shard.unlink()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2 // 3, size * 2 // 3))
        try:
            repair(copy, found=lambda: verify(copy), config=lambda: make_config(copy))
        except BaseException as error:  # noqa: BLE001 - the child must not return into pytest
            os._exit(7 if "cannot write" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert not shard.exists() and not (copy / "work").exists()
    repair(copy, found=lambda: verify(copy), config=lambda: make_config(copy))
    assert contents(copy) == contents(cache)


def test_the_small_disk_of_these_tests_is_really_small(small_disk):
    disk = small_disk(64 * 1024)
    if disk is not None:
        with pytest.raises(OSError, match="No space left"):
            (disk / "file").write_bytes(bytes(200_000))
