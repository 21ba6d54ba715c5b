"""The MLflow run of a training: on the server that this user named, as one run; refusals are reported."""

import json
import os
import shutil
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sending import rows, sent

from flowmask.models.errors import CheckpointError
from flowmask.trainer.state.run_folder import RunFolder
from flowmask.trainer.track import database, mlflow_run, sender, spool, tracking
from flowmask.trainer.track.plans import default_uri
from flowmask.trainer.track.spool import TrackingPlan
from flowmask.trainer.track.tracking import Tracker, offer_artifact, replay

pytestmark = pytest.mark.usefixtures("at_home")


def runs_in(path: Path) -> list[tuple[str, list[int]]]:
    """First word of the name, and steps, of every run in a database, oldest first."""
    with closing(sqlite3.connect(path)) as database:
        found = database.execute("SELECT name, run_uuid FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time")
        query = "SELECT step FROM metrics WHERE run_uuid = ? AND key = 'train/step' ORDER BY step"
        first_word = [(name.split()[0], uuid) for name, uuid in found.fetchall()]
        return [(name, [step for (step,) in database.execute(query, [uuid])]) for name, uuid in first_word]


def test_a_run_that_starts_anew_is_a_new_mlflow_run_and_a_resumed_one_the_same(planned: Any, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    rows(out)
    first = planned(out, resumed=False)
    assert sent(out)[0] == tracking.DONE
    again = planned(out, run_id="of the checkpoint")
    assert (again.key, again.run_id) == (first.key, None)
    rows(out, range(4, 6))
    assert sent(out)[0] == tracking.DONE
    (out / "metrics.jsonl").unlink()  # as after the deletion of checkpoints/
    spool.add_metrics(out, 5, {"eval_loss": 1.0})
    new = planned(out, resumed=False, run_id="of nothing")
    assert new.key != first.key and new.run_id is None
    rows(out, range(1, 3))
    assert sent(out)[0] == tracking.DONE
    assert runs_in(tmp_path / "runs" / "mlflow.db") == [("a", [1, 2, 3, 4, 5]), ("a", [1, 2])]


def test_a_run_whose_tracking_files_are_lost_goes_on_in_the_mlflow_run_of_its_checkpoint(
    planned: Any, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "a"
    rows(out)
    planned(out, resumed=False)
    assert sent(out)[0] == tracking.DONE
    run_id = spool.read_sent(out, uri=default_uri(out)).run_id
    for name in ("tracking.json", spool.SENT):
        (out / name).unlink()
    rows(out, range(4, 6))
    assert planned(out, run_id=run_id).run_id == run_id
    assert sent(out)[0] == tracking.DONE
    (out / spool.SENT).unlink()  # only the new key finds the run now
    assert planned(out, run_id=run_id).run_id is None
    assert sent(out)[0] == tracking.DONE
    assert runs_in(tmp_path / "runs" / "mlflow.db") == [("a", [1, 2, 3, 4, 5])]


def test_a_copied_folder_is_a_new_mlflow_run_and_a_moved_one_the_same(planned: Any, tmp_path: Path) -> None:
    a, b, c = (tmp_path / "runs" / name for name in "abc")
    rows(a)
    first = planned(a, resumed=False)
    assert sent(a)[0] == tracking.DONE
    shutil.copytree(a, b)
    with pytest.raises(CheckpointError, match=r"b is a copy of .*a, and its MLflow run belongs to that one"):
        replay(b, timeout_s=1, warn=print)
    rows(b, range(4, 6))
    assert planned(b, run_id=spool.read_sent(a, uri=first.uri).run_id).key != first.key
    assert "is a copy of" in planned.said[-1]
    copied = spool.key_of(b)
    assert planned(b).key == copied and planned(a).key == first.key  # each continues its own run
    assert sent(b)[0] == tracking.DONE
    elsewhere = tmp_path / "elsewhere" / "c"
    elsewhere.parent.mkdir()
    a.rename(elsewhere)
    rows(elsewhere, range(4, 5))
    moved = planned(elsewhere)
    assert (moved.key, moved.uri) == (first.key, first.uri)  # the database stays in the old place
    assert sent(elsewhere)[0] == tracking.DONE
    assert runs_in(tmp_path / "runs" / "mlflow.db") == [("a", [1, 2, 3, 4]), ("b", [1, 2, 3, 4, 5])]
    planned(a, resumed=False)  # another run starts in the old place
    assert spool.copied_from(elsewhere) is None
    c.symlink_to(b)
    assert spool.copied_from(c) is None
    (tmp_path / "runs").rename(tmp_path / "all")
    there = tmp_path / "all" / "b"
    assert tracking._server_of(there, named=None) == default_uri(there) == planned(there).uri


def test_a_relative_database_is_the_first_starts_from_any_folder(
    planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, here, there = tmp_path / "a", tmp_path / "here", tmp_path / "there"
    rows(out)
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    first = planned(out, resumed=False, **{"tracking.uri": "sqlite:///my.db"})
    assert first.uri == f"sqlite:///{here}/my.db"
    assert sent(out)[0] == tracking.DONE
    monkeypatch.chdir(there)
    assert planned(out, **{"tracking.uri": "sqlite:///my.db"}).uri == first.uri
    assert planned(out, **{"tracking.uri": "sqlite:///other.db"}).uri == f"sqlite:///{there}/other.db"
    assert planned(out, **{"tracking.uri": "http://h"}).uri == "http://h"
    assert not list(there.iterdir())


@pytest.mark.parametrize("name", ["what? 50%20 #1 é", "a?b=c", "%", "#", "a b", "日本", "x;y&z", "it's"])
def test_a_database_lies_beside_the_run_whatever_its_folder_is_called(name: str, planned: Any, tmp_path: Path) -> None:
    out = tmp_path / name / "run"
    rows(out)
    (out / "overlay.txt").write_text("hi")
    spool.add_artifact(out, out / "overlay.txt", to="evaluation/step_1")
    planned(out, resumed=True)
    assert sent(out) == (tracking.DONE, [])
    assert runs_in(out.parent / "mlflow.db") == [("run", [1, 2, 3])]
    assert len(list((out.parent / "mlflow_artifacts").rglob("evaluation/step_1/overlay.txt"))) == 1
    assert {each.name for each in tmp_path.iterdir()} <= {name, "state"}


def lasting_uri(kind: str, folder: Path) -> tuple[str, str]:
    """A server that can never accept a run, and a word of the reason."""
    (folder / "notes.db").write_text("no database " * 1000)
    (folder / "file").touch()
    return {
        "file store": (f"file://{folder}/mlruns", "maintenance mode"),
        "plain path": (f"{folder}/mlruns", "maintenance mode"),
        "scheme": ("ftp://h/x", "unsupported URI"),
        "driver": ("postgresql+nodriver://u:Mark3r@h/db", "Can't load plugin"),
        "no database": (f"sqlite:///{folder}/notes.db", "not a database"),
        "no folder": (f"sqlite:///{folder}/file/my.db", "file"),
        "name": (f"sqlite:///{folder}/my?.db", "without ?"),
    }[kind]


@pytest.mark.parametrize("kind", ["file store", "plain path", "scheme", "driver", "no database", "no folder", "name"])
def test_a_server_that_waiting_does_not_mend_is_told_whole_and_at_once(kind: str, planned: Any, tmp_path: Path) -> None:
    out = tmp_path / "a"
    rows(out)
    uri, reason = lasting_uri(kind, tmp_path)
    planned(out, resumed=False, **{"tracking.uri": uri})
    started = time.monotonic()
    code, said = sent(out, uri)
    assert code == tracking.LEFT and time.monotonic() - started < 20
    assert len(said) == 1 and reason in said[0] and "\n" not in said[0] and "Mark3r" not in said[0]


def test_a_deleted_experiment_is_told_with_the_way_back_and_then_the_run_goes_on(planned: Any, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    out = tmp_path / "a"
    rows(out)
    plan = planned(out, resumed=False)
    assert sent(out)[0] == tracking.DONE
    client = MlflowClient(tracking_uri=plan.uri)
    experiment = client.get_experiment_by_name("flowmask")
    client.delete_experiment(experiment.experiment_id)
    code, said = sent(out)
    assert code == tracking.LEFT and len(said) == 1 and f"restore --experiment-id {experiment.experiment_id}" in said[0]
    client.restore_experiment(experiment.experiment_id)
    assert sent(out) == (tracking.DONE, [])


def test_a_database_that_somebody_left_beside_a_run_sends_no_file_elsewhere(planned: Any, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    server, out = Listener(), tmp_path / "runs" / "a"
    rows(out)
    mlflow_run._make_database(out.parent / "mlflow.db")
    client = MlflowClient(tracking_uri=default_uri(out))
    client.create_experiment("flowmask", artifact_location=f"{server.uri}/theirs")
    planned(out, resumed=False)
    code, said = sent(out)
    server.close()
    assert code == tracking.LEFT and len(said) == 1 and "which nobody asked for" in said[0] and server.heard == b""


def test_a_note_that_can_never_be_taken_is_told_and_blocks_nothing(planned: Any, tmp_path: Path) -> None:
    out = tmp_path / "a"
    rows(out)
    planned(out, resumed=True)
    (out / "good.txt").write_text("good")
    (out / "pictures").mkdir()
    (out / "pictures" / "out").symlink_to("/etc")
    os.mkfifo(out / "pipe")
    places = ["../../up", "/abs", "a//b", "a/../../b", "", "x\ny", "%2e%2e/up"]
    for to in places:
        spool.add_artifact(out, out / "good.txt", to=to)
    spool.add_artifact(out, out / "pictures", to="x")
    spool.add_artifact(out, out / "pipe", to="x")
    with (out / spool.OUTBOX).open("a") as file:
        for line in ({"artifact": 3}, {"metrics": {"a": 1}}, {"metrics": {"a": "x"}, "step": 1, "time": 1}, [1], {}):
            file.write(json.dumps(line) + "\n")
        file.write('{"metrics": {"a": 1}, "step": 1e400, "time": 1}\n{"metrics": {"a": 1}, "step": 1, "time": 1e999}\n')
        file.write(json.dumps({"metrics": {"a": 1.0}, "step": 2**70, "time": 1}) + "\n")
    spool.add_artifact(out, out / "good.txt", to="evaluation")
    spool.add_metrics(out, 3, {"eval_loss": 0.5})
    code, said = sent(out)
    assert code == tracking.LEFT and all("\n" not in line for line in said)
    assert len(said) == len(places) + 2, said
    assert len(list((tmp_path / "mlflow_artifacts").rglob("good.txt"))) == 1
    assert not list(tmp_path.rglob("up")) and not (tmp_path / "b").exists()
    assert sent(out) == (tracking.DONE, [])  # entries that were reported are skipped


class Listener:
    """Another user's server; it records requests."""

    def __init__(self) -> None:
        import socket

        self.heard = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
                self.heard += caller.recv(65536) or b"connected"
                caller.close()
            except OSError:
                return

    def close(self) -> None:
        self._socket.close()


def strangers_run(out: Path, uri: str, secret: Path, *, mark: object = None) -> None:
    """A run folder made by a stranger. The stranger names the server, and files of this user."""
    rows(out)
    plan = {"key": "k" * 32, "uri": uri, "experiment": "e", "name": "n", "status": "FINISHED", "mark": mark}
    (out / "tracking.json").write_text(json.dumps(plan))
    (out / "link.txt").symlink_to(secret)
    (out / "inside.txt").write_text("theirs")
    lines = [
        {"artifact": str(path), "to": "x", "mark": mark}
        for path in (secret, secret.parent, out / ".." / secret.name, out / "link.txt", out / "inside.txt")
    ]
    (out / spool.OUTBOX).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("mark", [None, "", "0" * 64, 1])
def test_a_strangers_run_sends_nothing_to_the_server_that_it_names(
    mark: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "Mark3r")
    monkeypatch.setenv("SECRET", "Mark3r")
    server, secret = Listener(), tmp_path / "home" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("Mark3r")
    out = tmp_path / "runs" / "theirs"
    for uri in (server.uri, f"{server.uri}/${{oc.env:SECRET}}", f"sqlite:///{tmp_path}/planted.db"):
        shutil.rmtree(out, ignore_errors=True)
        strangers_run(out, uri, secret, mark=mark)
        with pytest.raises(CheckpointError, match=r"was not started by you: its tracking\.json names .* --uri URI"):
            replay(out, timeout_s=1, warn=print)
        before = (out / spool.OUTBOX).read_bytes()
        assert not offer_artifact(out, secret, to="export") and (out / spool.OUTBOX).read_bytes() == before
    server.close()
    assert server.heard == b"" and not (tmp_path / "planted.db").exists()


def test_a_strangers_run_goes_only_where_this_user_says_and_takes_no_file_along(tmp_path: Path) -> None:
    secret, out = tmp_path / "home" / "secret.txt", tmp_path / "runs" / "theirs"
    secret.parent.mkdir()
    secret.write_text("Mark3r")
    mine = f"sqlite:///{tmp_path}/mine.db"
    own = tmp_path / "runs" / "own"  # a run of this user; the stranger knows its id and key
    rows(own, range(1, 2))
    spool.write_plan(own, TrackingPlan(key="k" * 32, uri=mine, experiment="e", name="own", status="FINISHED"))
    assert sent(own)[0] == tracking.DONE
    known = spool.read_sent(own, uri=mine)
    strangers_run(out, "http://evil.example", secret)
    (out / spool.SENT).write_text(known.model_dump_json())
    said: list[str] = []
    assert not replay(out, timeout_s=120, warn=said.append, uri=mine)
    assert len([line for line in said if "none of your commands registered it" in line]) == 4, said
    assert runs_in(tmp_path / "mine.db") == [("own", [1]), ("n", [1, 2, 3])]
    kept = [path for path in (tmp_path / "runs" / "mlflow_artifacts").rglob("*") if path.is_file()]
    assert sorted(path.name for path in kept) == ["config.yaml", "config.yaml", "inside.txt"]
    assert all("Mark3r" not in path.read_text() for path in kept)


def test_a_link_in_the_place_of_the_config_is_not_followed(tmp_path: Path) -> None:
    secret, out = tmp_path / "secret.txt", tmp_path / "run"
    secret.write_text("Mark3r")
    rows(out)
    (out / "config.yaml").unlink()
    (out / "config.yaml").symlink_to(secret)
    spool.write_plan(out, TrackingPlan(key="k", uri=f"sqlite:///{tmp_path}/my.db", experiment="e", name="n"))
    code, said = sent(out)
    assert code == tracking.LEFT and "config.yaml is a link" in said[0]
    assert not list((tmp_path / "mlflow_artifacts").rglob("*.yaml"))


def test_ones_own_run_is_sent_and_offered_without_a_word_more(planned: Any, tmp_path: Path) -> None:
    out, made = tmp_path / "runs" / "mine", tmp_path / "predicted.txt"
    rows(out)
    made.write_text("mine")
    planned(out, resumed=False)
    assert offer_artifact(out, made, to="predict")
    assert sent(out) == (tracking.DONE, [])
    assert len(list((tmp_path / "runs" / "mlflow_artifacts").rglob("predict/predicted.txt"))) == 1


@pytest.mark.parametrize("trials", [1, pytest.param(20, marks=pytest.mark.long)])
def test_three_first_runs_at_once_in_a_folder_with_a_half_made_database_all_arrive(trials: int, tmp_path: Path) -> None:
    """Real sender processes, in a folder whose name is not valid in a URI."""
    for trial in range(trials):
        runs = tmp_path / f"{trial} what?"
        runs.mkdir()
        with closing(sqlite3.connect(runs / "mlflow.db")) as half:
            half.execute("CREATE TABLE alembic_version (version_num TEXT)")
        os.utime(runs / "mlflow.db", (0, 0))
        said: list[str] = []
        folders, trackers = [], []
        for name in "abc":
            folders.append(RunFolder(runs / name))
            folders[-1].write_config({"train": {}, "model": {}, "data": {}})
            rows(runs / name)
            plan = TrackingPlan(key=name, uri=default_uri(runs / name), experiment="e", name=name, end_timeout_s=120)
            trackers.append(Tracker(runs / name, plan, warn=said.append))
        for tracker in trackers:
            tracker.close("FINISHED")
        for folder in folders:
            folder.close()
        told = [line for line in said if not line.startswith("MLflow: `mlflow ui ")]  # each names the place to look
        assert len(told) == 1 and "half made" in told[0] and len(said) == 4, said
        assert sorted(runs_in(runs / "mlflow.db")) == [(name, [1, 2, 3]) for name in "abc"]


def test_the_reasons_of_an_outage_are_no_lasting_fault() -> None:
    for text in ("Connection refused", "database is locked", "timed out", "500 Server Error", "Too Many Requests"):
        assert not database.is_lasting(RuntimeError(text)), text
    assert max(sender._RETRY_S) < sender._LASTING_S
