"""Laws of claims with real processes: one owner while leases hold, and no harm when a lease is lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from trials import SEED, TRIALS

from flowmask.data_pipeline.cache.shards import cache_file, remove_leftovers
from flowmask.data_pipeline.claim import claims
from flowmask.data_pipeline.claim.claims import SharedUnits, claim, claims_in, once, share_out
from flowmask.data_pipeline.claim.leases import WORKER, filesystem_now, read_lease, this_worker
from flowmask.models.errors import CacheError

ROOT = Path(__file__).parents[3]
HOUR_NS = 3600 * 10**9


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


_RACER = """
import os, sys
from pathlib import Path
from flowmask.data_pipeline.claim.claims import SharedUnits, share_out
folder, units = Path(sys.argv[1]), int(sys.argv[2])
def work(unit):
    with open(folder / "log", "a") as log:
        log.write(f"{unit}\\n")
    beside = folder / f".{unit}.{os.getpid()}"
    beside.write_text(str(unit))
    beside.replace(folder / str(unit))
print("ready", flush=True)
sys.stdin.readline()
share_out(SharedUnits(range(units), folder=folder / "work" / "claims", kind="unit", lease_s=float(sys.argv[3]),
                      done=lambda unit: (folder / str(unit)).exists()), work)
"""


def race(folder: Path, *, racers: int, units: int, lease_s: float = 60.0) -> list[subprocess.Popen[str]]:
    """Start workers at the same moment, all at unit 0."""
    started = [python(_RACER, folder, units, lease_s) for _ in range(racers)]
    assert [said(racer) for racer in started] == ["ready"] * racers
    for racer in started:
        go(racer)
    return started


def worked(folder: Path) -> Counter[int]:
    return Counter(map(int, (folder / "log").read_text().split()))


@pytest.mark.parametrize(
    ("racers", "units"), [(3, 60), pytest.param(8, 2000, marks=pytest.mark.long)], ids=["few", "many"]
)
def test_of_workers_that_race_for_each_unit_one_gets_it(tmp_path, racers, units):
    for racer in race(tmp_path, racers=racers, units=units):
        assert racer.wait(timeout=300) == 0
    assert worked(tmp_path) == dict.fromkeys(range(units), 1)
    assert claims_in(tmp_path / "work" / "claims") == []


@pytest.mark.parametrize("how", ["claims stolen", "folder removed"])
def test_losing_claims_while_working_does_no_harm(tmp_path, how):
    """Every unit is done and every worker ends without an error, even if claims or their folder are deleted."""
    racers, draw = race(tmp_path, racers=3, units=150), random.Random(1)
    while any(racer.poll() is None for racer in racers):
        if how == "folder removed":
            shutil.rmtree(tmp_path / "work", ignore_errors=True)
        elif found := claims_in(tmp_path / "work" / "claims"):
            (tmp_path / "work" / "claims" / draw.choice(found).name).unlink(missing_ok=True)
        time.sleep(0.002)
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert worked(tmp_path).keys() == set(range(150))
    assert all((tmp_path / str(unit)).read_text() == str(unit) for unit in range(150))


def race_with_deaths(folder: Path, *, deaths: int, seed: int, units: int) -> None:
    draw = random.Random(seed)
    racers = race(folder, racers=3, units=units)
    for _ in range(deaths):
        time.sleep(draw.uniform(0, 0.1))
        victim = draw.choice(racers)
        victim.kill()  # not waited for: a zombie counts as dead too
        racers.append(python(_RACER, folder, units, 60.0))  # joins late
        go(racers[-1])
    assert sorted({racer.wait(timeout=60) for racer in racers}) in ([-9, 0], [0])
    assert worked(folder).keys() == set(range(units))


def test_workers_that_die_and_join_leave_no_unit_behind_and_nobody_waits_for_a_lease(tmp_path):
    race_with_deaths(tmp_path, deaths=4, seed=0, units=400)


@pytest.mark.long
def test_many_deaths_leave_no_unit_behind(tmp_path):
    for trial in range(3 * TRIALS):
        seed = SEED + trial
        (tmp_path / str(trial)).mkdir()
        race_with_deaths(tmp_path / str(trial), deaths=12, seed=seed, units=1500)


_HOLDER = """
import sys
from pathlib import Path
from flowmask.data_pipeline.claim.claims import claim
with claim(Path(sys.argv[1]), wait=False, lease_s=float(sys.argv[2])) as ours:
    print(ours, flush=True)
    sys.stdin.readline()
print("released", flush=True)
"""


def is_free(path: Path) -> bool:
    with claim(path, wait=False) as ours:
        return ours


def test_a_unit_is_free_at_once_when_its_owner_dies_on_this_host_and_not_before(tmp_path):
    holder = python(_HOLDER, tmp_path / "unit", 1000)
    assert said(holder) == "True"
    assert not is_free(tmp_path / "unit")
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the process table
    assert is_free(tmp_path / "unit")
    holder.wait()
    assert is_free(tmp_path / "unit")


def test_a_released_unit_is_free_and_another_threads_is_not(tmp_path):
    with claim(tmp_path / "unit", wait=False) as ours, claim(tmp_path / "unit", wait=False) as twice:
        assert ours and not twice
    assert is_free(tmp_path / "unit")


def foreign(path: Path, *, silent_s: float = 0.0, lease_s: float = 1000.0, **changes: Any) -> Path:
    """A claim of a process on another host, `silent_s` after its last heartbeat; return its lease."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = path.with_name(f"{WORKER}foreign-{path.name}")
    other = {"host": "elsewhere", "machine": "m", "boot": "b", "namespace": "pid:[1]"}
    lease.write_text(json.dumps(this_worker(lease_s).model_dump() | other | changes))
    path.symlink_to(lease.name)
    beat(lease, silent_s)
    return lease


def beat(lease: Path, silent_s: float) -> None:
    then = filesystem_now(lease.parent) - int(silent_s * 1e9)
    os.utime(lease, ns=(then, then))


HERE = this_worker(1000.0).model_dump()
DEAD_PID = 2**22 + 1  # greater than the kernel's largest pid


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, False),
        (HERE, False),
        (HERE | {"pid": DEAD_PID}, True),
        (HERE | {"started": HERE["started"] + 1}, True),
        (HERE | {"boot": "an earlier one"}, True),
        (HERE | {"boot": "an earlier one", "host": "elsewhere"}, False),
        (HERE | {"boot": "an earlier one", "machine": "another"}, False),
        (HERE | {"pid": DEAD_PID, "boot": "another host's", "machine": "another"}, False),
        (HERE | {"pid": DEAD_PID, "namespace": "pid:[1]"}, False),
    ],
    ids=[
        "other host",
        "alive",
        "dead",
        "pid used again",
        "rebooted",
        "other name",
        "other machine",
        "dead elsewhere",
        "container",
    ],
)
def test_only_an_owner_that_this_host_knows_to_be_dead_is_dead(tmp_path, changes, free):
    foreign(tmp_path / "unit", **changes)
    assert is_free(tmp_path / "unit") is free


def time_to_take(path: Path, *, at_most_s: float = 30.0) -> float:
    start = time.monotonic()
    with claim(path, wait=True) as ours:
        assert ours
    assert time.monotonic() - start < at_most_s
    return time.monotonic() - start


@pytest.fixture(params=[-5, 5], ids=["slow clock", "fast clock"])
def wrong_clock(request, monkeypatch):
    """This node's clock is hours wrong; the filesystem's clock is right."""
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + request.param * HOUR_NS)
    monkeypatch.setattr(time, "time", lambda: (real() + request.param * HOUR_NS) / 1e9)


def test_a_silent_owner_on_another_host_loses_its_unit_by_the_filesystems_clock(tmp_path, wrong_clock):
    foreign(tmp_path / "silent", silent_s=4, lease_s=3)
    assert not is_free(tmp_path / "silent")  # a first look is no proof: the next heartbeat may come
    assert 0.5 < time_to_take(tmp_path / "silent") < 2.5
    foreign(tmp_path / "fresh", silent_s=4, lease_s=1000)
    for _ in range(3):
        assert not is_free(tmp_path / "fresh")


@pytest.mark.parametrize("silent_s", [-5 * 3600, 5 * 3600], ids=["ahead", "behind"])
def test_a_filesystem_that_stamps_with_its_clients_clocks_does_no_harm(tmp_path, silent_s):
    """A heartbeat from a node with a clock hours off counts, and so does its silence."""
    lease = foreign(tmp_path / "unit", lease_s=1.5)
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        beat(lease, silent_s)
        assert not is_free(tmp_path / "unit")
        time.sleep(0.1)
    time_to_take(tmp_path / "unit", at_most_s=6)


def test_a_lease_that_nobody_understands_is_respected_until_it_is_old(tmp_path):
    lease = foreign(tmp_path / "unit")
    lease.write_text('{"another": "version"}')
    assert not is_free(tmp_path / "unit")
    lease.unlink()
    assert is_free(tmp_path / "unit")


def test_the_heart_beats_while_the_main_thread_is_in_torch(tmp_path):
    with claim(tmp_path / "unit", wait=False, lease_s=1.2):
        weights = torch.randn(1200, 1200)
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            weights = weights @ weights / 1e4
        lease = read_lease(tmp_path / "unit")
        assert lease is not None
        assert filesystem_now(tmp_path) - lease.beat_ns < 1.0 * 1e9


def test_a_stopped_worker_loses_its_unit_and_does_no_harm_when_it_goes_on(tmp_path):
    holder = python(_HOLDER, tmp_path / "unit", 1)
    assert said(holder) == "True"
    holder.send_signal(signal.SIGSTOP)
    with claim(tmp_path / "unit", wait=True) as ours:
        assert ours
        holder.send_signal(signal.SIGCONT)
        go(holder)
        assert said(holder) == "released"
        assert holder.wait(timeout=30) == 0
        assert [found.name for found in claims_in(tmp_path)] == ["unit"]  # still our claim
    assert claims_in(tmp_path) == []


def test_a_slow_owner_whose_half_file_was_cleared_away_waits_for_the_others_and_goes_on(tmp_path):
    result, tries = tmp_path / "unit.tar", []

    def work(unit: int) -> None:
        tries.append(unit)
        with cache_file(result) as file:
            file.write(b"bytes of the unit")
            if len(tries) == 1:
                remove_leftovers(tmp_path, result.name)  # as a new owner does

    share_out(SharedUnits([0], folder=tmp_path / "work", kind="unit", done=lambda _: result.exists()), work)
    assert tries == [0, 0]
    assert result.read_bytes() == b"bytes of the unit"


def test_what_is_taken_over_is_taken_by_one(tmp_path):
    """Many workers find the same dead owner at the same moment: one of them becomes the owner."""
    for unit in range(20):
        foreign(tmp_path / "claims" / f"unit-{unit:06d}", **(HERE | {"pid": DEAD_PID}))
    (tmp_path / "work").mkdir()
    shutil.move(tmp_path / "claims", tmp_path / "work" / "claims")
    for racer in race(tmp_path, racers=3, units=20):
        assert racer.wait(timeout=60) == 0
    assert worked(tmp_path) == dict.fromkeys(range(20), 1)


def test_one_that_dies_at_a_thing_done_once_is_replaced(tmp_path):
    planner = python(_HOLDER, tmp_path / "plan", 1000)
    assert said(planner) == "True"
    plan: list[str] = []
    threading.Timer(0.5, planner.kill).start()
    once(tmp_path / "plan", done=lambda: bool(plan), work=lambda: plan.append("planned"))
    assert plan == ["planned"]
    assert planner.wait() == -signal.SIGKILL
    once(tmp_path / "plan", done=lambda: bool(plan), work=lambda: plan.append("again"))
    assert plan == ["planned"]


def test_waiting_for_a_minute_looks_few_times(monkeypatch):
    waited_s, pauses = 0.0, claims._pauses(120.0)
    looks = sum(1 for _ in takewhile(lambda _: waited_s < 60, iter(int, 1)) if (waited_s := waited_s + next(pauses)))
    assert looks < 40
    assert max(next(pauses) for _ in range(20)) < 10  # so the end of a build is noticed soon


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "symlink_to", full)
    with pytest.raises(CacheError, match="No space left on device") as raised:
        is_free(tmp_path / "claims" / "unit")
    assert "\n" not in str(raised.value)


def test_a_disk_that_is_full_when_the_lease_is_written_leaves_no_half_of_it(tmp_path, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(CacheError, match="No space left on device"):
            is_free(tmp_path / "claims" / "unit")
    assert list((tmp_path / "claims").iterdir()) == []
    assert is_free(tmp_path / "claims" / "unit")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot write .*file/claims: Not a directory") as raised:
        is_free(tmp_path / "file" / "claims" / "unit")
    assert "\n" not in str(raised.value)
