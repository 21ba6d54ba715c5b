"""Other programs see only a complete MLflow database, in any place, however often its maker is killed."""

import multiprocessing
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from trials import SEED, TRIALS

from flowmask.trainer.track import database
from flowmask.trainer.track.database import absolute, file_of, is_half_made, make_whole

DRAWS = 3 * TRIALS

STEPS = 6


def make(path: Path, *, pause_s: float = 0.002) -> None:
    """A database as MLflow makes it: table by table, its first experiment last."""
    with closing(sqlite3.connect(path, isolation_level=None)) as made:
        made.execute("CREATE TABLE alembic_version (version TEXT)")
        made.execute("CREATE TABLE experiments (name TEXT)")
        for step in range(STEPS):
            time.sleep(pause_s)
            made.execute(f"CREATE TABLE more_{step} (x TEXT)")
        made.execute("INSERT INTO experiments VALUES ('Default')")


def open_as_a_run(path: str, failed: Any) -> None:
    """As in each run: let the database be made, and use it."""
    try:
        make_whole(Path(path), make, say=lambda line: None)
        with closing(sqlite3.connect(path)) as made:
            (count,) = made.execute("SELECT count(*) FROM sqlite_master").fetchone()
        assert count == STEPS + 2 and not is_half_made(Path(path))
    except BaseException as error:  # noqa: BLE001 - the test shows it
        failed.put(repr(error))


def at_once(path: Path, draw: random.Random, *, kill: bool) -> None:
    """Three runs at the same time, one of which can be killed; then one more."""
    fork = multiprocessing.get_context("fork")
    failed = fork.Queue()
    runs = [fork.Process(target=open_as_a_run, args=(str(path), failed)) for _ in range(3)]
    for run in runs:
        run.start()
    if kill:
        time.sleep(draw.uniform(0, 0.03))
        runs[0].kill()
    last = fork.Process(target=open_as_a_run, args=(str(path), failed))
    last.start()
    for run in (*runs, last):
        run.join(60)
        assert run.exitcode in (0, -signal.SIGKILL)
    assert failed.empty(), failed.get()
    assert {left.name for left in path.parent.iterdir()} == {path.name, f".{path.name}.lock"}


@pytest.mark.parametrize("kill", [False, True])
def test_runs_that_start_at_once_share_one_whole_database_whoever_is_killed(kill: bool, tmp_path: Path) -> None:
    for trial in range(5 * DRAWS):
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        at_once(folder / "mlflow.db", random.Random(f"{SEED} {trial}"), kill=kill)


@pytest.mark.parametrize("left", ["empty", "begun", "journal"])
def test_a_half_made_database_is_set_aside_and_named(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SETTLED_S", 0.0)
    path, said = tmp_path / "mlflow.db", list[str]()
    path.touch()
    if left != "empty":
        with closing(sqlite3.connect(path)) as begun:
            begun.execute("CREATE TABLE alembic_version (version TEXT)")
            begun.execute("CREATE TABLE experiments (name TEXT)")
    if left == "journal":
        (tmp_path / "mlflow.db-journal").write_bytes(b"")
    before = path.read_bytes()
    make_whole(path, make, say=said.append)
    (aside,) = [each for each in tmp_path.glob("mlflow.db.half-made-*") if "journal" not in each.name]
    assert aside.read_bytes() == before and not is_half_made(path)
    assert len(said) == 1 and str(path) in said[0] and aside.name in said[0]
    make_whole(path, lambda _: pytest.fail("it is whole"), say=said.append)


def test_what_is_no_database_of_mlflow_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("a person's notes " * 100)
    make_whole(path, lambda _: pytest.fail("it is there"), say=pytest.fail)
    path.unlink()
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
    make_whole(path, lambda _: pytest.fail("it is there"), say=pytest.fail)
    assert [each.name for each in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_database_that_is_being_made_by_another_program_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    maker = multiprocessing.get_context("fork").Process(target=make, args=(path,), kwargs={"pause_s": 0.3})
    maker.start()
    while not path.exists():
        time.sleep(0.01)
    make_whole(path, lambda _: pytest.fail("it is being made"), say=pytest.fail)
    maker.join()
    assert not is_half_made(path)


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:///my.db", "my.db"),
        ("sqlite:////data/50%20#? é/my.db", "/data/50%20#? é/my.db"),
        ("sqlite:////data/my.db?timeout=5", "/data/my.db"),
        ("sqlite:///:memory:", None),
        ("sqlite:///file:x?uri=true", None),
        ("http://h/my.db", None),
        ("postgresql://h/db", None),
    ],
)
def test_the_file_of_a_uri_is_taken_letter_by_letter(
    uri: str, file: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert file_of(uri) == (None if file is None else Path(file))
    if file is None:
        assert absolute(uri) == uri
    else:
        assert file_of(absolute(uri)) == tmp_path / file and absolute(absolute(uri)) == absolute(uri)


REAL = """
import os, sys, threading
from pathlib import Path
from flowmask.trainer.track.mlflow_run import _make_database, quieten
quieten()
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
os.chdir(sys.argv[1])
threading.Timer(float(sys.argv[2]), os._exit, (9,)).start()
_make_database(Path("mlflow.db"))
os._exit(0)
"""


@pytest.mark.long
def test_mlflows_own_database_whose_maker_is_ended_at_any_moment_is_known_as_half_made(tmp_path: Path) -> None:
    """The real tables at the real path, made as by a program without our lock."""
    draw, half = random.Random(f"{SEED}"), 0
    for trial in range(5 * DRAWS):
        folder = tmp_path / str(trial)
        folder.mkdir()
        ended = subprocess.run([sys.executable, "-c", REAL, folder, str(draw.uniform(0, 4))], check=False)
        path = folder / "mlflow.db"
        if ended.returncode == 0:
            assert not is_half_made(path)
            continue
        half += is_half_made(path)
        from mlflow.tracking import MlflowClient

        if path.exists() and not is_half_made(path):
            MlflowClient(tracking_uri=f"sqlite:///{path}").create_experiment("usable")
    assert half
