"""A user with a separate home and databases, and the plans of runs that are not trained."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import run_config

from flowmask.trainer.config import RunConfig
from flowmask.trainer.track import mlflow_run, spool, tracking
from flowmask.trainer.track.plans import RunFacts
from flowmask.trainer.track.spool import TrackingPlan
from flowmask.trainer.track.tracking import start_tracking


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new database as MLflow creates it, which takes seconds."""
    mlflow_run.quieten()
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlflow_run._make_database(folder / "mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def at_home(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate user for the test. The sender runs in this process, and may change the working folder."""
    monkeypatch.setattr(mlflow_run, "_make_database", lambda path: shutil.copyfile(template, path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plan of a run that starts in `out`, without a sender process."""
    said: list[str] = []

    def fake(folder: Path, plan: TrackingPlan, *, warn: Any) -> Any:
        spool.write_plan(folder, plan)
        return SimpleNamespace(plan=plan)

    def config_of(out: Path, **settings: Any) -> RunConfig:
        return run_config(Path("lab"), out, {"tracking.enabled": True, "train.log_every_steps": 1, **settings})

    def start(out: Path, *, resumed: bool = True, run_id: str | None = None, **settings: Any) -> TrackingPlan:
        config = config_of(out, **settings)
        out.mkdir(parents=True, exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(tracking, "Tracker", fake)
            facts = RunFacts({"train.lr": 1}, {"objective": "o"} | {"stage": str(config.tracking.stage)})
            made: Any = start_tracking(config, facts, resumed=resumed, run_id=run_id, warn=said.append)
        return made.plan  # type: ignore[no-any-return]

    start.said, start.config = said, config_of  # type: ignore[attr-defined]
    return start
