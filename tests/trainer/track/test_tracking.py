"""MLflow sees one run per training run, complete and once, and can neither stop nor slow the training."""

import errno
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Line, Postgres, Server, wait_until
from runs import GOLDEN, SignalAt, start
from trials import SEED, TRIALS

from flowmask.models.errors import CheckpointError
from flowmask.trainer.score.evaluate import evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.state import provenance
from flowmask.trainer.state.run_folder import RunFolder
from flowmask.trainer.track import mlflow_run, names, spool, tracking
from flowmask.trainer.track.plans import default_uri
from flowmask.trainer.track.spool import TrackingPlan
from flowmask.trainer.track.tracking import Tracker, replay

TRACKED = {"tracking.enabled": True, "train.log_every_steps": 1, "tracking.end_timeout_s": 120}
HELPERS = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2] / "support")])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is given up after 2 s, so that tests with a hanging server are short."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.fixture(scope="module")
def sqlite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder, database=f"sqlite:///{folder / 'mlflow.db'}")
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def line(sqlite_server: Server) -> Iterator[Line]:
    sqlite_server.start()
    line = Line(sqlite_server.port)
    yield line
    line.close()


class Writer:
    """A run folder whose rows a test writes, tracked under a separate experiment."""

    def __init__(self, out: Path, *, uri: str, experiment: str, after: int = 0, end_timeout_s: float = 120):
        """`after`: the step of the checkpoint to continue from."""
        self.out, self.step, self.warnings = out, after, list[str]()
        self._folder = RunFolder(out)
        self._folder.write_config({"train": {"lr": 1}, "model": {}, "data": {}})
        self._folder.open_metrics(after_step=after)
        self.plan = TrackingPlan(
            key=spool.key_of(out),
            uri=uri,
            experiment=experiment,
            name=out.name,
            params={"train.lr": "1", "long": "x" * 9000},
            started_ms=1_700_000_000_000,
            end_timeout_s=end_timeout_s,
        )
        self.tracker = Tracker(out, self.plan, warn=self.warnings.append)

    def train(self, steps: int) -> None:
        """Write rows of `steps` more steps; the loss is a function of the step."""
        for _ in range(steps):
            self.step += 1
            row = {"step": self.step, "time": time.time(), "loss": loss(self.step), "step_s": 0.1}
            self._folder.add_row(row | ({"skipped": True, "loss": None} if self.step % 10 == 9 else {}))

    def close(self, status: spool.Status) -> None:
        self.tracker.close(status)
        self._folder.close()

    def kill_sender(self) -> None:
        if self.tracker._process is not None:
            self.tracker._process.kill()


def loss(step: int) -> float:
    return 1.0 / step


def the_run(client: Any, experiment: str) -> Any:
    """The one run of an experiment."""
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id])
    return run


def has_step(server: Server, experiment: str, step: int) -> bool:
    found = server.client.get_experiment_by_name(experiment)
    runs = server.client.search_runs([found.experiment_id]) if found is not None else []
    return any(run.data.metrics.get("train/step", 0) >= step for run in runs)


def check_whole(client: Any, experiment: str, *, steps: int, status: str) -> None:
    """One run with one point for every step and this end status."""
    run = the_run(client, experiment)
    assert run.info.status == status
    marks = Counter(point.step for point in client.get_metric_history(run.info.run_id, "train/step"))
    assert marks == Counter(range(1, steps + 1))
    losses = {p.step: p.value for p in client.get_metric_history(run.info.run_id, "train/loss")}
    assert losses == {step: loss(step) for step in range(1, steps + 1) if step % 10 != 9}
    assert run.data.metrics["train/skipped_steps"] == (steps + 1) // 10


def test_one_mlflow_run_across_restarts_with_params_metrics_and_the_right_end(lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with SignalAt.on_every_run():
        start(lab, out, TRACKED)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(default_uri(out))
    stopped = the_run(client, "flowmask")
    assert stopped.info.status == "KILLED"
    start(lab, out, TRACKED | {"tracking.peak_tflops": 1.0})
    run = the_run(client, "flowmask")
    assert run.info.run_id == stopped.info.run_id and run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == "0.002"
    assert not [key for key in run.data.params if key.startswith(("launch", "tracking", "evaluate", "out", "lora"))]
    assert [p.step for p in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(1, 11))
    losses = ("loss", "loss_at_video", "loss_elsewhere", "grad_norm", "lr", "epoch", "skipped_steps", "step")
    rates = ("examples_per_s", "tokens_per_s", "model_tflop_per_s", "mfu_pct", "data_wait_pct", "host_memory_gib")
    assert all(key.startswith(("train/", "system/")) for key in run.data.metrics)
    assert run.data.metrics.keys() >= {
        *(f"train/{name}" for name in losses),
        *(f"system/{name}" for name in (*rates, "step_s_p50", "step_s_p90", "step_s_p99")),
    }
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    check_facts(run, out)
    start(lab, out, TRACKED | {"train.steps": 11})
    assert the_run(client, "flowmask").data.tags["resumed.train.steps"] == "11"


def check_facts(run: Any, out: Path) -> None:
    """The run's user, objective, data, machine and code, and its name with its start time."""
    tags, commit = run.data.tags, provenance.git_commit()
    assert tags["mlflow.source.git.commit"] == commit.removesuffix("-dirty") and tags["mlflow.user"]
    assert (tags["objective"], tags["dataset"], tags["gpus"]) == ("flow_matching", "cache", "none")
    assert tags["host"] == platform.node() and tags["folder"] == str(out) and "stage" not in tags
    began = time.strftime("%m%d-%H%M%S", time.localtime(run.info.start_time / 1000))
    assert run.info.run_name == f"{out.name} {began}"
    (found,) = run.inputs.dataset_inputs
    manifest = json.loads((Path(json.loads(found.dataset.source)["uri"]) / "manifest.json").read_text())
    facts = json.loads(found.dataset.profile)
    assert (found.dataset.name, found.tags[0].value, facts["examples"]) == ("cache", "training", manifest["examples"])
    assert facts["fingerprint"] == manifest["fingerprint"]["total"]
    page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
    assert f"open http://127.0.0.1:5000{page}" in (out / "log.txt").read_text()


def test_a_server_that_is_late_and_dies_in_the_middle_gets_everything_once(
    sqlite_server: Server, tmp_path: Path
) -> None:
    server, name = sqlite_server, "late and dying"
    server.kill()
    writer = Writer(tmp_path / "run", uri=server.uri, experiment=name)
    writer.train(50)
    wait_until(lambda: bool(writer.warnings), "the line that says the server is away")
    server.start()
    wait_until(lambda: has_step(server, name, 50), "the steps from before the server")
    server.kill()
    writer.train(100)
    writer.tracker.log(100, {"eval_loss": 0.5})
    (tmp_path / "overlay.mp4").write_bytes(b"frames")
    writer.tracker.artifact(tmp_path / "overlay.mp4", to="evaluation")
    server.start()
    writer.train(5)
    writer.close("FINISHED")
    check_whole(server.client, name, steps=155, status="FINISHED")
    run = the_run(server.client, name)
    assert run.data.metrics["eval/loss"] == 0.5 and len(run.data.params["long"]) == 500
    (video,) = server.client.list_artifacts(run.info.run_id, "evaluation")
    assert video.path == "evaluation/overlay.mp4" and video.file_size == 6


def test_a_postgresql_that_dies_under_the_server_gets_everything_once(tmp_path: Path) -> None:
    database = Postgres()
    server = Server(tmp_path, database=database.uri)
    try:
        server.start()
        writer = Writer(tmp_path / "run", uri=server.uri, experiment="postgresql")
        writer.train(50)
        wait_until(lambda: has_step(server, "postgresql", 50), "the first steps")
        database.kill()
        writer.train(100)
        writer.tracker.log(100, {"eval_loss": 0.5})
        wait_until(lambda: bool(writer.warnings), "the line that says the server is away")
        database.start()
        writer.close("FINISHED")
        check_whole(server.client, "postgresql", steps=150, status="FINISHED")
        assert the_run(server.client, "postgresql").data.metrics["eval/loss"] == 0.5
    finally:
        server.kill()
        database.remove()


def test_answers_that_are_lost_double_nothing(line: Line, sqlite_server: Server, tmp_path: Path) -> None:
    """The server does the work, but its answers are lost, so the client asks again."""
    line.set("mute")
    writer = Writer(tmp_path / "run", uri=line.uri, experiment="mute")
    writer.train(20)
    wait_until(lambda: bool(writer.warnings), "a lost answer")
    line.set("open")
    wait_until(lambda: has_step(sqlite_server, "mute", 20), "the first steps")
    line.set("mute")
    writer.train(20)
    wait_until(lambda: has_step(sqlite_server, "mute", 40), "the steps whose answers are lost")
    line.set("open")
    writer.train(20)
    writer.close("FINISHED")
    check_whole(sqlite_server.client, "mute", steps=60, status="FINISHED")


def test_a_run_that_is_made_after_its_maker_gave_up_is_deleted(sqlite_server: Server, tmp_path: Path) -> None:
    sqlite_server.start()
    client = sqlite_server.client
    writer = Writer(tmp_path / "run", uri=sqlite_server.uri, experiment="late")
    writer.train(10)
    wait_until(lambda: has_step(sqlite_server, "late", 10), "the steps")
    first = the_run(client, "late").info
    client.create_run(first.experiment_id, tags={mlflow_run.KEY_TAG: writer.plan.key})
    writer.close("FINISHED")
    assert the_run(client, "late").info.run_id == first.run_id


def test_an_end_without_the_server_is_short_and_what_is_left_is_sent_later(
    line: Line, sqlite_server: Server, tmp_path: Path
) -> None:
    line.set("cut")
    writer = Writer(tmp_path / "run", uri=line.uri, experiment="later", end_timeout_s=2)
    writer.train(30)
    started = time.monotonic()
    writer.close("KILLED")
    assert time.monotonic() - started < 6
    assert f"`flowmask track {writer.out}` sends the rest" in writer.warnings[-1]
    line.set("open")
    assert replay(writer.out, timeout_s=120, warn=writer.warnings.append)
    check_whole(sqlite_server.client, "later", steps=30, status="KILLED")
    info = the_run(sqlite_server.client, "later").info
    assert (info.start_time, info.end_time) == (writer.plan.started_ms, spool.read_plan(writer.out).ended_ms)
    command = [sys.executable, "-m", "flowmask", "track", str(writer.out)]
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "MLflow has everything of" in again.stdout
    check_whole(sqlite_server.client, "later", steps=30, status="KILLED")


CRASHING = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_tracking import Writer
from flowmask.trainer.track.spool import read_sent
writer = Writer(Path(sys.argv[2]), uri=sys.argv[3], experiment="crash")
writer.train(20)
while read_sent(writer.out, uri=sys.argv[3]).run_id is None:
    time.sleep(0.1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_training_is_failed_and_its_next_start_continues_the_same_run(
    sqlite_server: Server, tmp_path: Path
) -> None:
    sqlite_server.start()
    out, client = tmp_path / "run", sqlite_server.client
    crash = [sys.executable, "-c", CRASHING, HELPERS, str(out), sqlite_server.uri]
    assert subprocess.run(crash, check=False).returncode == -signal.SIGKILL
    wait_until(lambda: the_run(client, "crash").info.status == "FAILED", "the status of the crashed run")
    check_whole(client, "crash", steps=20, status="FAILED")
    last_row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert the_run(client, "crash").info.end_time == int(1000 * last_row["time"])
    first = the_run(client, "crash").info.run_id
    (out / spool.SENT).unlink()  # as if the sender had died before it saved the id
    writer = Writer(out, uri=sqlite_server.uri, experiment="crash", after=12)
    writer.train(18)  # repeats eight steps
    writer.close("FINISHED")
    check_whole(client, "crash", steps=30, status="FINISHED")
    assert the_run(client, "crash").info.run_id == first


def test_a_server_that_accepts_and_never_answers_costs_neither_time_nor_life(tmp_path: Path) -> None:
    line = Line(port=1)
    line.set("silent")
    started = time.perf_counter()
    writer = Writer(tmp_path / "run", uri=line.uri, experiment="silent", end_timeout_s=1)
    writer.train(20_000)
    logged = time.perf_counter() - started
    wait_until(lambda: bool(writer.warnings), "the line that says so")
    started = time.perf_counter()
    writer.close("FINISHED")
    line.close()
    assert logged < 10 and time.perf_counter() - started < 5  # a blocking call would take minutes
    assert len(writer.warnings) == 2 and "\n" not in "".join(writer.warnings)
    assert "can't be reached" in writer.warnings[0] and "has not accepted everything" in writer.warnings[1]
    assert len((writer.out / "metrics.jsonl").read_text().splitlines()) == 20_000


def test_replay_is_refused_for_a_run_that_trains_and_for_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tracking\.json"):
        replay(tmp_path, timeout_s=1, warn=print)
    folder = RunFolder(tmp_path / "run")
    plan = TrackingPlan(key="k", uri="http://127.0.0.1:1", experiment="e", name="n")
    spool.write_plan(tmp_path / "run", plan)
    with pytest.raises(CheckpointError, match="is being written by process"):
        replay(tmp_path / "run", timeout_s=1, warn=print)
    folder.close()


def test_a_full_disk_ends_no_training_on_account_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path / "run", uri="http://127.0.0.1:1", experiment="full", end_timeout_s=0)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("add_metrics", "add_artifact", "write_plan"):
        monkeypatch.setattr(spool, name, full)
    writer.tracker.log(1, {"eval_loss": 1.0})
    writer.tracker.artifact(tmp_path)
    writer.close("FAILED")
    assert sum("No space left" in line for line in writer.warnings) == 3


def test_params_of_any_length_and_keys_of_any_letters_fit() -> None:
    assert mlflow_run.short("x" * 500) == "x" * 500
    assert len(mlflow_run.short("x" * 501)) == 500 and mlflow_run.short("x" * 600) != mlflow_run.short("x" * 601)
    assert names.allowed("data.sources.MeViS (ü)") == "data.sources.MeViS ___"


@pytest.mark.long
def test_a_sender_and_a_line_that_fail_at_any_moment_lose_and_double_nothing(
    line: Line, sqlite_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_RESTART_S", 0.2)
    trials, seed = 3 * TRIALS, SEED
    for trial in range(trials):
        draw = random.Random(f"{seed} {trial}")
        name = f"chaos {seed} {trial}"
        writer, furthest = Writer(tmp_path / f"run {trial}", uri=line.uri, experiment=name), 0
        for _ in range(12):
            writer.train(draw.randint(0, 30))
            furthest = max(furthest, writer.step)
            line.set(draw.choice(["open", "open", "silent", "mute", "cut"]))
            if draw.random() < 0.4:
                writer.kill_sender()
            if draw.random() < 0.2:
                line.set("open")
                after = draw.randint(max(0, writer.step - 20), writer.step)
                writer.close(draw.choice(["KILLED", "FAILED"]))
                writer = Writer(writer.out, uri=line.uri, experiment=name, after=after)
            time.sleep(draw.uniform(0, 4))
        line.set("open")
        writer.train(max(1, furthest - writer.step))  # MLflow does not delete points
        writer.close("FINISHED")
        check_whole(sqlite_server.client, name, steps=writer.step, status="FINISHED")


def test_the_scores_of_a_split_stand_in_a_servers_run_at_the_step_of_their_checkpoint(
    sqlite_server: Server, lab: Path, tmp_path: Path
) -> None:
    sqlite_server.start()
    out, name = tmp_path / "run", "scores"
    tracked = TRACKED | {"tracking.uri": sqlite_server.uri, "tracking.experiment": name}
    assert start(lab, out, tracked | {"train.steps": 2}) == 0
    box = {"height_px": 32, "width_px": 64, "size_multiple": 16}
    data = {"source": "mevis", "root": str(GOLDEN), "split": "valid_u"}
    tree = {"out": tmp_path / "e", "checkpoint": str(out), "data": data, "box": box, "protocol": "mevis"}
    scores = evaluate(EvaluateConfig.model_validate(tree))
    assert scores is not None
    assert replay(out, timeout_s=120, warn=pytest.fail)
    client = sqlite_server.client
    run = the_run(client, name)
    for key, value in scores.totals.items():
        (point,) = client.get_metric_history(run.info.run_id, f"test/mevis/valid_u/{key}")
        assert (point.step, point.value) == (2, value), key
    place = f"test/mevis/valid_u/{scores.fingerprint}"
    files = {file.path for file in client.list_artifacts(run.info.run_id, place)}
    assert {f"{place}/scores.json", f"{place}/report.html"} <= files
    (point,) = client.get_metric_history(run.info.run_id, "test/mevis/valid_u/mevis_jf")
    assert point.value == scores.protocol["tables"][scores.protocol["convention"]]["all"]["jf"]
    assert run.info.status == "FINISHED"
