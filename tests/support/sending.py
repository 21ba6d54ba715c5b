"""Run folders as a sender finds them, and a sender that runs in the test's process."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

from flowmask.trainer.track import spool
from flowmask.trainer.track.sender import Sender

ROWS = 3


def rows(out: Path, steps: range = range(1, ROWS + 1)) -> None:
    """A run folder with rows of metrics."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text("train: {}\nmodel: {}\ndata: {}\n")
    with (out / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "time": step, "loss": 1.0}) + "\n" for step in steps)


def sent(out: Path, uri: str | None = None) -> tuple[int, list[str]]:
    """Send an ended run from this process; the exit code and the messages."""
    plan, said, over = spool.read_plan(out), list[str](), threading.Event()
    assert plan is not None
    over.set()
    plan = plan.model_copy(update={"uri": uri or plan.uri})
    forget_databases()
    code = Sender(out.resolve(), plan, SimpleNamespace(reached=over), said.append).run()  # type: ignore[arg-type]
    return code, said


def forget_databases() -> None:
    """Forget MLflow's open databases. MLflow keeps them by URI, and in another folder the same URI is another file."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose()
    SqlAlchemyStore._engine_map.clear()
    _tracking_store_registry._get_store_with_resolved_uri.cache_clear()
