"""The MLflow run of a training run, in the sending process (sender.py); the only importer of MLflow."""

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowmask.models.errors import UserError
from flowmask.models.process import without
from flowmask.models.safe.secrets import masked_uri
from flowmask.trainer.state.run_folder import CONFIG
from flowmask.trainer.track import database, spool
from flowmask.trainer.track.names import OLDER_STEP, STEP, allowed, mlflow_name
from flowmask.trainer.track.points import Point
from flowmask.trainer.track.spool import Sent, Status, TrackingPlan

KEY_TAG = "flowmask.run"
_PARENT_TAG = "mlflow.parentRunId"

_MONITOR_EVERY_S = 30.0  # between two samples of the machine's load
_PARAM_CHARACTERS = 500  # every MLflow server since 1.0 accepts it; the config artifact has the whole value
_DATASET_CHARACTERS = 500
_PARAMS_A_REQUEST, _METRICS_A_REQUEST = 100, 1000
_ELSEWHERE = re.compile(r"(?!file:)[A-Za-z][\w+.-]*:")
_PLACE = re.compile(r"[\w. -]+(?:/[\w. -]+)*")


class MlflowRun:
    """The MLflow run of a plan. Every call may raise any error of a server or client, and may be repeated."""

    def __init__(self, folder: Path, plan: TrackingPlan, *, say: Callable[[str], None], begins: bool = True) -> None:
        """Find the run or make it, and send the facts about the training.

        plan: its `uri` includes the server's secrets. begins: set the run's status to RUNNING; else leave it.
        """
        quieten()
        with without("pandas", "scipy"):  # a third of the import; mlflow-skinny has neither
            from mlflow.tracking import MlflowClient

        quieten()  # importing mlflow has reset its loggers
        self._folder, self._plan = folder, plan
        uri, path = plan.uri, database.file_of(plan.uri)
        if path is not None:
            uri = database.entered(path)
            database.make_whole(path, _make_database, say=say)
        self._client: Any = MlflowClient(tracking_uri=uri)
        self._server = masked_uri(plan.uri)
        self.sent = spool.read_sent(folder, uri=self._server)
        self._experiment_id = self._experiment()
        self.run_id = self._run()
        self.uri = uri
        self.note_sent(0 if self._has_older_names() else self.sent.outbox_bytes)
        if not begins:
            return
        self._client.update_run(self.run_id, status="RUNNING")
        self._send_tags()
        self._send_params()
        if (folder / CONFIG).exists():
            self.send_artifact(folder / CONFIG, to=None)

    def _experiment(self) -> str:
        name = self._plan.experiment
        found = self._client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise UserError(f"its experiment {name} was deleted: `{restore}`, or choose another tracking.experiment")
        if found is not None and self._plan.asked is None and _ELSEWHERE.match(found.artifact_location):
            raise UserError(
                f"its experiment {name} sends files to {masked_uri(found.artifact_location)}, which nobody asked for; "
                "if you mean it, name this database by tracking.uri"
            )
        if found is not None:
            return str(found.experiment_id)
        served = self._plan.uri.startswith(("http://", "https://", "databricks"))
        beside = self._folder.resolve().parent / "mlflow_artifacts"  # otherwise MLflow uses the working folder
        location = None if served else beside.as_uri()
        return str(self._client.create_experiment(name, artifact_location=location))

    def _run(self) -> str:
        """The known id, the run that an earlier start made without noting it, or a new run.

        A server may make a run after the client has given up waiting. Such a run is empty and has this plan's tag; it
        is deleted. A run with another key belongs to another training: it is taken over only if the plan lost its key
        and names the run in `run_id`; then the run gets the new key.
        """
        for known in (self.sent.run_id, self._plan.run_id):
            if known is not None and self._is_known(known, adopt=known == self._plan.run_id):
                self._delete_copies(of=known)
                return known
        self.sent = Sent(uri=self._server)  # the run is missing, so nothing is sent
        found = self._tagged()
        if not found:
            plan, tags = self._plan, {**self._plan.tags, KEY_TAG: self._plan.key}
            run = self._client.create_run(
                self._experiment_id, run_name=plan.name, tags=tags, start_time=plan.started_ms
            )
            return str(run.info.run_id)
        oldest = str(found[0].info.run_id)
        self._delete_copies(of=oldest)
        return oldest

    def is_active(self) -> bool:
        """Whether the run exists on the server and is not deleted."""
        return self._is_known(self.run_id, adopt=False)

    def _is_known(self, run_id: str, *, adopt: bool) -> bool:
        """Whether this run exists with the plan's key; adopt: with any key, which is then replaced by the plan's."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        if run.info.lifecycle_stage != "active":
            return False
        if run.data.tags.get(KEY_TAG) != self._plan.key:
            if not adopt:
                return False
            self._client.set_tag(run_id, KEY_TAG, self._plan.key)
        return True

    def _take_children(self) -> None:
        """Make the runs of the plan's `children` child runs of this one, as MLflow's pages nest them."""
        for key in self._plan.children:
            for run in self._tagged(key):
                self._client.set_tag(run.info.run_id, _PARENT_TAG, self.run_id)

    def _tagged(self, key: str | None = None) -> list[Any]:
        """The runs of a key, by default the plan's, the oldest first."""
        ours = f"tags.`{KEY_TAG}` = '{key or self._plan.key}'"
        return list(self._client.search_runs([self._experiment_id], ours, order_by=["attributes.start_time ASC"]))

    def _delete_copies(self, *, of: str) -> None:
        for run in self._tagged():
            if run.info.run_id != of and not run.data.metrics:
                self._client.delete_run(run.info.run_id)

    def note_sent(self, outbox_bytes: int) -> None:
        """Store the run's id and the number of outbox bytes already sent."""
        where = {"run_id": self.run_id, "experiment_id": self._experiment_id}
        sent = Sent(uri=self._server, **where, outbox_bytes=outbox_bytes)
        if sent != spool.read_sent(self._folder, uri=self._server):
            spool.write_sent(self._folder, sent)
        self.sent = sent

    def last_step(self) -> int:
        """The last training step whose metrics the server has; 0 if none."""
        return int(self._client.get_run(self.run_id).data.metrics.get(STEP, 0))

    def _has_older_names(self) -> bool:
        """Whether all metrics have names of a version without groups: then all are sent again with today's names."""
        there = self._client.get_run(self.run_id).data.metrics
        return OLDER_STEP in there and STEP not in there

    def _send_tags(self) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, short(value)) for key, value in self._plan.tags.items()]
        self._client.log_batch(self.run_id, tags=tags)

    def send_datasets(self) -> None:
        """Send the datasets of the run; the server keeps only one of equal ones."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for one in self._plan.datasets:
            source, profile = json.dumps({"uri": one.place}), json.dumps(one.counts | {"fingerprint": one.fingerprint})
            dataset = Dataset(one.name[:_DATASET_CHARACTERS], one.digest, "local", source, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", one.context)]))
        if inputs:
            self._client.log_inputs(self.run_id, inputs)

    def is_below(self) -> bool:
        """Whether it is a child of another run."""
        return _PARENT_TAG in self._client.get_run(self.run_id).data.tags

    def put_below(self, other: "MlflowRun") -> None:
        self._client.set_tag(self.run_id, _PARENT_TAG, other.run_id)

    def _send_params(self) -> None:
        """Params can't change in MLflow: a resume adds only new ones, and stores changed ones as tags."""
        from mlflow.entities import Param

        there = self._client.get_run(self.run_id).data
        params = {allowed(key): short(value) for key, value in self._plan.params.items()}
        new = [Param(key, value) for key, value in params.items() if key not in there.params]
        for start in range(0, len(new), _PARAMS_A_REQUEST):
            self._client.log_batch(self.run_id, params=new[start : start + _PARAMS_A_REQUEST])
        for key, value in params.items():
            tag = f"resumed.{key}"
            if there.tags.get(tag, there.params.get(key, value)) != value:
                self._client.set_tag(self.run_id, tag, value)

    def send_steps(self, points: Sequence[Point]) -> None:
        """Send points of training steps, each complete or not at all, with a mark that shows the last sent step."""
        self._send([p._replace(metrics=p.metrics | {STEP: float(p.step)}) for p in points])

    def send_note(self, point: Point) -> None:
        """Send a point that is no training step's; MLflow drops the second of two equal points."""
        self._send([point])

    def _send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        request: list[Any] = []
        for point in points:
            metrics = [Metric(mlflow_name(k), v, point.time_ms, point.step) for k, v in point.metrics.items()]
            if len(request) + len(metrics) > _METRICS_A_REQUEST:
                self._client.log_batch(self.run_id, metrics=request)
                request = []
            request += metrics
        if request:
            self._client.log_batch(self.run_id, metrics=request)

    def send_artifact(self, path: Path, *, to: str | None) -> None:
        """Upload a file or a folder's content; UserError for a path that leads out of the folder or the artifacts."""
        if to is not None and (not _PLACE.fullmatch(to) or ".." in to.split("/")):
            raise UserError(f"its place {to!r} is no path below the run's artifacts")
        spool.refuse_ways_out(path)
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), to)
        else:
            self._client.log_artifact(self.run_id, str(path), to)

    def finish(self, status: Status, ended_ms: int | None) -> None:
        """ended_ms: when the training ended, possibly long ago; None: now."""
        self._take_children()
        self._delete_copies(of=self.run_id)
        self._client.set_terminated(self.run_id, status=status, end_time=ended_ms)


def watch_node(uri: str, run_id: str) -> None:
    """Start a thread in which MLflow's monitor sends this machine's load to `system/HOST/...` of a run.

    The monitor ends at each outage of the server and is then made again. MLflow's own variables apply:
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, and false for MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.
    """
    quieten()
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING as ENABLED
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    place = {"run_id": run_id, "tracking_uri": uri, "node_id": allowed(os.uname().nodename)}

    def watch() -> None:
        while True:
            with suppress(Exception):
                SystemMetricsMonitor(**place, sampling_interval=_MONITOR_EVERY_S, resume_logging=True).monitor()
            time.sleep(_MONITOR_EVERY_S)

    if not ENABLED.is_set() or ENABLED.get():
        threading.Thread(target=watch, name="system metrics", daemon=True).start()


def _make_database(path: Path) -> None:
    """Make MLflow's tables in a new file in the working folder, and close it."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{path.name}", (Path.cwd() / "mlflow_artifacts").as_uri())
    store.engine.dispose()


def short(value: str) -> str:
    """A param's value in a length that every server accepts: a long one is cut and ends in its hash."""
    if len(value) <= _PARAM_CHARACTERS:
        return value
    mark = f"... sha256 {hashlib.sha256(value.encode()).hexdigest()[:16]}"
    return value[: _PARAM_CHARACTERS - len(mark)] + mark


def quieten() -> None:
    """MLflow sends no telemetry and prints nothing; the sender does the retries."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # MLflow's retries would make a run twice
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
