"""MLflow, kept at arm's length: one MLflow run per training run, however often that is restarted.

Every call is made by one background thread behind a bounded queue, so a slow, dead or lying server costs the
training neither time nor its life: metrics.jsonl has everything, MLflow gets what it can take.
"""

import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trainer.run_folder import write_atomically

Status = Literal["FINISHED", "FAILED", "KILLED"]

_QUEUE_ROWS = 10_000
_BATCH_ROWS = 200
_RETRY_S = 5.0
_PARAM_CHARACTERS = 500
_KEY_TAG = "flowmask.run"


class Tracker:
    """Feeds one MLflow run; `identity` is a small file in the run folder that ties all starts to that run."""

    def __init__(
        self,
        *,
        uri: str,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        identity: Path,
        warn: Callable[[str], None],
    ) -> None:
        """Return at once; connecting (and a new database's migrations) happens in the thread."""
        self._uri, self._experiment, self._name, self._params = uri, experiment, name, params
        self._identity, self._warn = identity, warn
        self._queue: queue.Queue[tuple[int, dict[str, float], int]] = queue.Queue(_QUEUE_ROWS)
        self._status: Status | None = None
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._warned = False
        self._dropped = 0
        self._known = _read_identity(identity)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has given one."""
        return self._known.get("run_id")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue one step's metrics; never waits, and drops them when the server is far behind."""
        try:
            self._queue.put_nowait((step, dict(metrics), int(time.time() * 1000)))
        except queue.Full:
            self._dropped += 1

    def close(self, status: Status, *, patience_s: float = 20.0) -> None:
        """Send what is queued and the final status; give up, with one line, after `patience_s`."""
        self._status, self._deadline = status, time.monotonic() + patience_s
        self._closing.set()
        self._thread.join(patience_s)
        if self._thread.is_alive() or self._dropped:
            left = self._queue.qsize() + self._dropped
            self._warn(
                f"MLflow at {self._uri} did not take everything ({left} rows left); metrics.jsonl has all"
            )

    def _work(self) -> None:
        client = self._patiently(self._connect)
        while client is not None:
            rows = self._next_rows()
            if rows and self._patiently(partial(self._send, client, rows)) is None:
                return
            if self._closing.is_set() and not rows and self._queue.empty():
                self._patiently(partial(self._finish, client))
                return

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Result of `call`, tried again until it succeeds or the tracker is closed and out of time (None)."""
        while True:
            try:
                return call()
            except Exception as error:  # noqa: BLE001 - whatever a tracking server does, training goes on
                if not self._warned:
                    self._warned = True
                    reason = (str(error).strip().splitlines() or [""])[0][:200]
                    self._warn(
                        f"MLflow at {self._uri} can't be reached ({type(error).__name__}: {reason}); "
                        "training goes on, metrics.jsonl has everything"
                    )
            if time.monotonic() + 1 >= self._deadline:
                return None
            self._closing.wait(_RETRY_S)
            if self._closing.is_set():
                time.sleep(0.5)

    def _connect(self) -> Any:
        _quieten()
        from mlflow.tracking import MlflowClient

        _quieten()  # importing mlflow has reset its loggers

        client = MlflowClient(tracking_uri=self._uri)
        experiment_id = _experiment_id(client, self._experiment)
        run_id = self.run_id or self._find(client, experiment_id)
        if run_id is None:
            run = client.create_run(experiment_id, run_name=self._name, tags={_KEY_TAG: self._known["key"]})
            run_id = run.info.run_id
        self._remember(run_id)
        client.update_run(run_id, status="RUNNING")
        self._send_params(client, run_id)
        return client

    def _find(self, client: Any, experiment_id: str) -> str | None:
        """The run of an earlier start that died between creating it and noting its id."""
        found = client.search_runs(
            [experiment_id], f"tags.`{_KEY_TAG}` = '{self._known['key']}'", max_results=1
        )
        return found[0].info.run_id if found else None

    def _remember(self, run_id: str) -> None:
        if self._known.get("run_id") != run_id:
            self._known["run_id"] = run_id
            write_atomically(self._identity, json.dumps(self._known))

    def _send_params(self, client: Any, run_id: str) -> None:
        """Params can't change in MLflow: a resume adds only new ones, and notes changed ones as tags."""
        from mlflow.entities import Param

        there = client.get_run(run_id).data.params
        params = {key: str(value)[:_PARAM_CHARACTERS] for key, value in self._params.items()}
        new = [Param(key, value) for key, value in params.items() if key not in there]
        for start in range(0, len(new), 100):
            client.log_batch(run_id, params=new[start : start + 100])
        for key, value in params.items():
            if there.get(key, value) != value:
                client.set_tag(run_id, f"resumed.{key}", value)

    def _send(self, client: Any, rows: list[tuple[int, dict[str, float], int]]) -> bool:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, now, step) for step, row, now in rows for key, value in row.items()]
        for start in range(0, len(metrics), 1000):
            client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        return True

    def _finish(self, client: Any) -> bool:
        client.set_terminated(self.run_id, status=self._status)
        return True

    def _next_rows(self) -> list[tuple[int, dict[str, float], int]]:
        """Wait for rows (or the close) and take what is there."""
        rows = []
        try:
            rows.append(self._queue.get(timeout=0 if self._closing.is_set() else 0.5))
            while len(rows) < _BATCH_ROWS:
                rows.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return rows


def default_uri(run_folder: Path) -> str:
    """A SQLite database beside the run folder, shared by the runs that lie there."""
    return f"sqlite:///{run_folder.resolve().parent / 'mlflow.db'}"


def _read_identity(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if "key" not in known:
        known = {"key": uuid.uuid4().hex}
        write_atomically(path, json.dumps(known))
    return known


def _experiment_id(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found is not None else client.create_experiment(name)


def _quieten() -> None:
    """MLflow neither phones home nor writes into the console, and gives a dead server up in seconds."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
