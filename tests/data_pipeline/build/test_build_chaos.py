"""Laws of a build whose workers join, leave, hang and die: it ends with the bytes of an undisturbed build."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from build_workers import contents, finish, start
from command import start_flowmask
from forks import Forked
from trials import SEED, TRIALS

from flowmask.data_pipeline.build.build import Build, build
from flowmask.data_pipeline.claim.leases import WORKER, filesystem_now, this_worker
from flowmask.data_pipeline.config import CacheBuildConfig

VIEWS = 4


@pytest.fixture(scope="module")
def many(make_config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CacheBuildConfig]:
    """Configs of one cache of many units, each in another folder."""
    folder = tmp_path_factory.mktemp("many")
    return lambda name: make_config(folder / name, cache={"views": VIEWS, "clips_per_shard": 1, "lease_s": 1.0})


@pytest.fixture(scope="module")
def undisturbed(many: Callable[[str], CacheBuildConfig]) -> dict[str, str]:
    """The cache that one worker makes without a break."""
    build(many("undisturbed"))
    return contents(many("undisturbed").out)


def chaos(config: CacheBuildConfig, *, workers: int, events: int, seed: int) -> None:
    """Kill, stop and add workers at random moments; then all remaining workers end without an error."""
    draw = random.Random(seed)
    crew = [start(config, worker=i, workers=workers) for i in range(workers)]
    stopped: list[Forked] = []
    try:
        for _ in range(events):
            victim, what = draw.choice(crew), draw.choice(["kill", "kill", "stop", "join"])
            if what == "join":
                crew.append(start(config, worker=draw.randrange(workers), workers=workers))
                continue
            if victim not in stopped:
                victim.follow(draw.randint(1, 6 * VIEWS))
            if what == "kill":
                victim.kill()
            else:
                victim.signal(signal.SIGSTOP)
                stopped.append(victim)
        all_end_well([worker for worker in crew if worker not in stopped])
        build(config)
        for worker in stopped:
            worker.signal(signal.SIGCONT)
        all_end_well(stopped)
    finally:
        for worker in crew:
            worker.kill()


def all_end_well(workers: list[Forked]) -> None:
    """Each worker ends without an error, or was killed by the test."""
    for worker in workers:
        code, said = worker.finish()
        assert code in (0, -signal.SIGKILL), said


def test_a_build_of_killed_stopped_and_added_workers_ends_with_the_same_bytes(many, undisturbed):
    chaos(many("chaos"), workers=3, events=4, seed=3)
    assert contents(many("chaos").out) == undisturbed


@pytest.mark.long
def test_many_such_builds_end_with_the_same_bytes(many, undisturbed):
    for trial in range(TRIALS):
        seed = SEED + trial
        chaos(many(f"chaos-{seed}"), workers=4, events=8, seed=seed)
        assert contents(many(f"chaos-{seed}").out) == undisturbed, f"SEED={seed}"


def test_a_worker_that_was_stopped_in_the_middle_ends_well_after_the_others_have_finished(many, undisturbed):
    config = many("stopped")
    worker = start(config)
    try:
        while not worker.follow(1).startswith("clips"):
            assert worker.running
        worker.follow(3)
        worker.signal(signal.SIGSTOP)
        build(config)
    finally:
        worker.signal(signal.SIGCONT)
    finish(worker)
    assert contents(config.out) == undisturbed


def test_units_of_owners_that_fell_silent_elsewhere_are_taken_over_the_plan_and_the_index_too(many, undisturbed):
    config = many("silent")
    claims = Path(config.out) / "work" / "claims"
    claims.mkdir(parents=True)
    lease = claims / f"{WORKER}elsewhere"
    owner = this_worker(1.0).model_copy(update={"boot": "another", "machine": "another"})
    lease.write_text(owner.model_dump_json())
    silent_ns = filesystem_now(claims) - 5 * 10**9
    os.utime(lease, ns=(silent_ns, silent_ns))
    for name in ("plan", "text-000000", "clips-000001", "clips-000001~1", "clips-000005", "finalise"):
        (claims / name).symlink_to(lease.name)
    build(config)
    assert contents(config.out) == undisturbed


@pytest.mark.parametrize("phase", ["_encode_sentences", "_encode_clips"])
def test_a_worker_under_whom_the_others_finish_encodes_nothing_and_ends_well(many, undisturbed, monkeypatch, phase):
    """The other workers have removed `work` with all its sentences before this worker asks for its next unit."""
    config = many(f"late{phase}")
    real = getattr(Build, phase)

    def late(self: Build, plan: object) -> None:
        monkeypatch.setattr(Build, phase, real)
        build(config)
        forbidden = property(lambda _: pytest.fail("encodes what is done"))
        monkeypatch.setattr(Build, "text_encoder", forbidden)
        monkeypatch.setattr(Build, "encoder", forbidden)
        real(self, plan)

    monkeypatch.setattr(Build, phase, late)
    build(config)
    assert contents(config.out) == undisturbed


def test_how_long_a_lease_lasts_does_not_shape_bytes(many, undisturbed):
    config = many("patient")
    patient = config.model_copy(update={"cache": config.cache.model_copy(update={"lease_s": 500.0})})
    build(patient)
    assert contents(config.out) == undisturbed
    build(config)  # lease_s is not part of the fingerprint


def test_a_rank_of_the_command_that_is_killed_is_done_without(many, undisturbed, tmp_path):
    config = many("ranks")
    (tmp_path / "cache.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = start_flowmask("cache", "build", tmp_path / "cache.yaml", "launch.processes_per_node=2")
    while not list(config.out.glob("shards/0*.json")):
        assert command.poll() is None
        time.sleep(0.05)
    psutil.Process(command.pid).children()[0].kill()
    said, _ = command.communicate(timeout=300)
    assert command.returncode == 0, said
    found = contents(config.out)
    found.pop("config.yaml", None)
    assert found == undisturbed
