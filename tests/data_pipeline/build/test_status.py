"""Laws of `cache status`: it reports the folder's content, by the filesystem's clock."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from build_workers import contents, start
from rich.console import Console
from typer.testing import CliRunner

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.build.status import CacheStatus, Count, LeaseStatus, status
from flowmask.data_pipeline.claim.claims import claim
from flowmask.data_pipeline.claim.leases import filesystem_now
from flowmask.launch.cli.cache_status import show_status
from flowmask.launch.cli.main import app
from flowmask.models.errors import CacheError


def printed(found: CacheStatus) -> str:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    show_status(found, console)
    return console.export_text()


def test_a_finished_cache_is_complete_and_untouched(cache):
    before = contents(cache)
    found = status(cache)
    assert (found.phase, found.leases, found.workers_alive, found.eta_s) == ("complete", [], 0, None)
    assert found.clips is not None and found.clips.done == found.clips.total > 0
    assert found.examples and f"{found.examples} examples" in printed(found)
    assert contents(cache) == before


def test_a_build_whose_worker_died_says_how_far_it_came_and_that_nobody_works_on_it(make_config, tmp_path):
    config = make_config(tmp_path / "cache")
    worker = start(config)
    while not worker.follow(1).startswith("clips"):
        assert worker.running
    worker.follow(3)
    worker.kill()
    found = status(config.out)
    assert found.phase in ("clips", "finalise")
    assert found.sentences is not None and found.sentences.done == found.sentences.total > 0
    sidecars = list((config.out / "shards").glob("[0-9]*.json"))
    assert found.units is not None and found.units.done == len(sidecars) <= found.units.total
    assert (found.workers_alive, found.rate_per_s, found.eta_s) == (0, None, None)
    assert {(lease.pid, lease.state) for lease in found.leases} <= {(worker.pid, "dead")}
    assert "no worker is running" in printed(found)


@pytest.fixture
def half_built(cache: Path, tmp_path: Path) -> Path:
    """A build with three finished units of two clips, ten seconds apart; the last is new."""
    shutil.copytree(cache, tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    (tmp_path / "half" / "quarantine.jsonl").unlink(missing_ok=True)
    texts = tmp_path / "half" / "work" / "texts"
    texts.mkdir(parents=True)
    (texts / "text-000000.safetensors").write_bytes(b"")
    shards = tmp_path / "half" / "shards"
    now = filesystem_now(texts)
    for unit, sidecar in enumerate(sorted(shards.glob("*.json"))):
        if unit > 2:
            sidecar.unlink()
        else:
            then = now - (2 - unit) * 10 * 10**9
            os.utime(sidecar, ns=(then, then))
    return tmp_path / "half"


@pytest.mark.parametrize("hours", [0, -7, 7])
def test_rate_and_time_left_follow_from_the_files_whatever_this_nodes_clock_says(half_built, monkeypatch, hours):
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + hours * 3600 * 10**9)
    with claim(half_built / "work" / "claims" / "clips-000003", wait=False):
        found = status(half_built)
    assert found.phase == "clips" and found.workers_alive == 1
    assert found.units is not None and found.units.done == 3
    assert found.clips is not None and found.clips.done == 6 < found.clips.total
    assert found.rate_per_s == pytest.approx(4 / 20, rel=0.02)
    assert found.eta_s == pytest.approx((found.clips.total - 6) * 5, rel=0.02)
    [lease] = found.leases
    assert (lease.unit, lease.pid, lease.state) == ("clips-000003", os.getpid(), "alive")
    assert lease.held_s < 5 and lease.silent_s < 5


def test_a_build_that_hangs_becomes_slower(half_built):
    with claim(half_built / "work" / "claims" / "clips-000003", wait=False):
        usual = status(half_built).rate_per_s
        for sidecar in (half_built / "shards").glob("*.json"):
            then = sidecar.stat().st_mtime_ns - 100 * 10**9
            os.utime(sidecar, ns=(then, then))
        hanging = status(half_built).rate_per_s
    assert usual is not None and hanging is not None and hanging < usual / 4


def test_clips_of_short_last_units_of_each_view_are_counted_exactly(make_config, tmp_path):
    config = make_config(tmp_path / "cache", cache={"clips_per_shard": 4})
    build(config)
    total, units = status(config.out).clips, status(config.out).units
    assert total is not None and units is not None
    assert total.total % 8 == 4 and units.total == 4  # two views of six clips: shards of 4, 2, 4, 2
    (config.out / "manifest.json").unlink()
    assert (status(config.out).clips, status(config.out).units) == (total, units)
    (config.out / "shards" / "000001.json").unlink()
    assert status(config.out).clips == Count(total.total - 2, total.total)


def test_quarantined_inputs_are_counted_while_building_and_after(half_built):
    live = half_built / "work" / "quarantine"
    live.mkdir()
    line = json.dumps({"video": "v", "clip": None, "file": "f", "reason": "r"})
    (live / "000001.jsonl").write_text(f"{line}\n{line}\n")
    assert status(half_built).quarantined == 2
    (half_built / "quarantine.jsonl").write_text(f"{line}\n")
    assert status(half_built).quarantined == 1
    assert "1 in quarantine" in printed(status(half_built))


def test_a_build_that_is_being_planned_is_one(tmp_path):
    with claim(tmp_path / "work" / "claims" / "plan", wait=False):
        found = status(tmp_path)
    assert (found.phase, found.clips, [lease.unit for lease in found.leases]) == ("plan", None, ["plan"])
    assert "planning" in printed(found)


@pytest.mark.parametrize("plan", ["no json", "[]", "{}"])
def test_a_damaged_plan_is_one_line(half_built, plan):
    (half_built / "plan" / "plan.json").write_text(plan)
    with pytest.raises(CacheError, match=r"plan\.json: damaged") as raised:
        status(half_built)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "said"), [("empty", "holds no cache"), ("nowhere", "no such folder")])
def test_what_is_no_cache_is_one_line(tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match=said) as raised:
        status(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "empty").iterdir())


def test_the_worst_leases_of_many_are_shown_first(cache):
    leases = [LeaseStatus(f"clips-{i:06d}", "node", i + 1, 5000.0, 1.0, "alive") for i in range(64)]
    leases.append(LeaseStatus("clips-000099", "node", 77, 5000.0, 500.0, "expired"))
    text = printed(CacheStatus(**{**vars(status(cache)), "leases": leases}))
    assert text.index("clips-000099") < text.index("clips-000000")
    assert "1 h 23 min" in text and "and 45 more" in text


def test_the_command_prints_one_json_object(cache):
    result = CliRunner().invoke(app, ["cache", "status", str(cache), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["phase"] == "complete"
