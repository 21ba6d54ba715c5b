"""MLflow, kept at arm's length: one MLflow run per training run, however often that is restarted.

The only file that imports MLflow, and it does so in the sending process alone (trainer/sender.py). Training
starts that process and writes files; it never waits for a server, and loses nothing to one.
"""

import hashlib
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import CheckpointError
from trainer import spool
from trainer.run_folder import CONFIG, TRACKING, RunFolder, flatten
from trainer.spool import Plan, Point, Sent, Status

if TYPE_CHECKING:
    from trainer.config import RunConfig

DONE, LEFT = 0, 3  # exit codes of the sender: the server has everything; it has not
KEY_TAG = "flowmask.run"
PROGRESS = "step"  # a metric whose value is its own step: the server's latest says how far it has the run

_ROOT = Path(__file__).resolve().parents[1]
_RESTART_S = 30.0
_PARAM_CHARACTERS = 500  # what every MLflow server since 1.0 takes; the config artifact has the whole value
_PARAMS_A_REQUEST, _METRICS_A_REQUEST = 100, 1000


class Tracker:
    """Training's end of the wire: starts the sender, and tells it by a closed pipe that the run has ended.

    The sender is a process of its own, so neither MLflow's imports nor its waiting take the interpreter from a
    step. It ends by itself when training dies in any way, and marks the run FAILED then.
    """

    def __init__(self, folder: Path, plan: Plan, *, warn: Callable[[str], None]) -> None:
        """Write the plan to the run folder and return at once."""
        self._folder, self._plan, self._warn = folder, plan, warn
        spool.write_plan(folder, plan)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._code: int | None = None
        self._thread = threading.Thread(target=self._supervise, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has given one."""
        return spool.read_sent(self._folder, uri=self._plan.uri).run_id or self._plan.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics that are not a training step's; those are read from metrics.jsonl."""
        self._write(lambda: spool.add_metrics(self._folder, step, metrics))

    def artifact(self, path: Path, *, to: str | None = None) -> None:
        """Upload a file or folder under the artifact folder `to`, some time: it is read when it is sent."""
        self._write(lambda: spool.add_artifact(self._folder, path, to=to))

    def _write(self, call: Callable[[], None]) -> None:
        """A disk that is full ends no training on MLflow's account."""
        try:
            call()
        except OSError as error:
            self._warn(f"{self._folder} can't be written for MLflow ({error.strerror}); training goes on")

    def close(self, status: Status) -> None:
        """Let everything be sent, with the final status; gives up, with one line, after `end_timeout_s`."""
        ended = self._plan.model_copy(update={"status": status})
        self._write(lambda: spool.write_plan(self._folder, ended))
        with self._lock:
            self._closing.set()
            _end_input(self._process)
        self._thread.join(self._plan.end_timeout_s + 2)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()
            self._thread.join(2)
        if self._code != DONE:
            or_start = "" if status == "FINISHED" else ", as does the next start"
            self._warn(
                f"MLflow at {self._plan.uri} has not taken everything; `flowmask track {self._folder}` sends "
                f"the rest{or_start}"
            )

    def _supervise(self) -> None:
        """Keep a sender alive, and pass on what it says."""
        while True:
            with self._lock:
                process = self._process = _start_sender(
                    self._folder, timeout_s=self._plan.end_timeout_s, parent=os.getpid()
                )
                last = self._closing.is_set()
                if last:
                    _end_input(process)
            assert process.stdout is not None
            for line in process.stdout:
                self._warn(line.rstrip("\n"))
            self._code = process.wait()
            if last or self._code in (DONE, LEFT):
                return
            self._closing.wait(_RESTART_S)


def replay(folder: Path, *, timeout_s: float, warn: Callable[[str], None]) -> bool:
    """Send what an ended run has left and set its status; whether the server has everything now.

    A run that died without a word is FAILED. CheckpointError if the run was never tracked, or is being trained:
    then it sends by itself.
    """
    if spool.read_plan(folder) is None:
        raise CheckpointError(
            f"{folder} has no readable {TRACKING}: it is no run, or was trained with tracking.enabled=false"
        )
    RunFolder(folder, patience_s=0).close()
    process = _start_sender(folder, timeout_s=timeout_s)
    assert process.stdout is not None
    for line in process.stdout:
        warn(line.rstrip("\n"))
    return process.wait() == DONE


def offer_artifact(run: str | Path, path: Path, *, to: str) -> bool:
    """Leave a file or folder that was made from a run for its MLflow run; whether `run` is one that is tracked.

    A run in training uploads it at once, one that has ended with `replay`.
    """
    folder = Path(run)
    if spool.read_plan(folder) is None:
        return False
    spool.add_artifact(folder, path, to=to)
    return True


def _start_sender(folder: Path, *, timeout_s: float, parent: int | None = None) -> subprocess.Popen[str]:
    """`python -m trainer.sender`: its session is its own, so that a terminal's ^C does not reach it."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    who = [str(parent)] if parent is not None else []
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.sender", str(folder), str(timeout_s), *who],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def _end_input(process: subprocess.Popen[str] | None) -> None:
    if process is not None and process.stdin is not None:
        process.stdin.close()


class MlflowRun:
    """The MLflow run of a plan. Every call may raise whatever a server can do to a client, and may be repeated."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Find the run or make it, and say in it what is trained."""
        quieten()
        from mlflow.tracking import MlflowClient

        quieten()  # importing mlflow has reset its loggers
        self._folder, self._plan = folder, plan
        self._client: Any = MlflowClient(tracking_uri=plan.uri)
        self.sent = spool.read_sent(folder, uri=plan.uri)
        self._experiment_id = self._experiment()
        self.run_id = self._run()
        self.note_sent(self.sent.outbox_bytes)
        self._client.update_run(self.run_id, status="RUNNING")
        self._send_params()
        self.send_artifact(folder / CONFIG, to=None)

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._plan.experiment)
        if found is not None:
            return str(found.experiment_id)
        served = self._plan.uri.startswith(("http://", "https://", "databricks"))
        beside = self._folder.resolve().parent / "mlflow_artifacts"  # else MLflow takes the working folder
        location = None if served else beside.as_uri()
        return str(self._client.create_experiment(self._plan.experiment, artifact_location=location))

    def _run(self) -> str:
        """The id that is known, or what an earlier start made without noting it, or a new run.

        A request to make one may be carried out after its answer was given up: what such requests leave is
        an empty run with our tag, and is deleted.
        """
        for known in (self.sent.run_id, self._plan.run_id):
            if known is not None and self._is_active(known):
                self._delete_copies(of=known)
                return known
        self.sent = Sent(uri=self._plan.uri)  # a run that is not there has nothing
        found = self._tagged()
        if not found:
            run = self._client.create_run(
                self._experiment_id, run_name=self._plan.name, tags={KEY_TAG: self._plan.key}
            )
            return str(run.info.run_id)
        oldest = str(found[0].info.run_id)
        self._delete_copies(of=oldest)
        return oldest

    def _is_active(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _tagged(self) -> list[Any]:
        ours = f"tags.`{KEY_TAG}` = '{self._plan.key}'"
        return list(
            self._client.search_runs([self._experiment_id], ours, order_by=["attributes.start_time ASC"])
        )

    def _delete_copies(self, *, of: str) -> None:
        for run in self._tagged():
            if run.info.run_id != of and not run.data.metrics:
                self._client.delete_run(run.info.run_id)

    def note_sent(self, outbox_bytes: int) -> None:
        """Remember the run's id and how much of the outbox it has."""
        sent = Sent(uri=self._plan.uri, run_id=self.run_id, outbox_bytes=outbox_bytes)
        if sent != spool.read_sent(self._folder, uri=self._plan.uri):
            spool.write_sent(self._folder, sent)
        self.sent = sent

    def last_step(self) -> int:
        """The last training step whose metrics the server has; 0 if it has none."""
        return int(self._client.get_run(self.run_id).data.metrics.get(PROGRESS, 0))

    def _send_params(self) -> None:
        """Params can't change in MLflow: a resume adds only new ones, and notes changed ones as tags."""
        from mlflow.entities import Param

        there = self._client.get_run(self.run_id).data
        params = {_name(key): short(value) for key, value in self._plan.params.items()}
        new = [Param(key, value) for key, value in params.items() if key not in there.params]
        for start in range(0, len(new), _PARAMS_A_REQUEST):
            self._client.log_batch(self.run_id, params=new[start : start + _PARAMS_A_REQUEST])
        for key, value in params.items():
            tag = f"resumed.{key}"
            if there.tags.get(tag, there.params.get(key, value)) != value:
                self._client.set_tag(self.run_id, tag, value)

    def send_steps(self, points: Sequence[Point]) -> None:
        """Training steps' points, each whole or not at all, with the mark that says how far the server is."""
        self._send([p._replace(metrics=p.metrics | {PROGRESS: float(p.step)}) for p in points])

    def send_note(self, point: Point) -> None:
        """One point beside the steps: MLflow drops the second of two equal points."""
        self._send([point])

    def _send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        request: list[Any] = []
        for point in points:
            metrics = [Metric(_name(k), v, point.time_ms, point.step) for k, v in point.metrics.items()]
            if len(request) + len(metrics) > _METRICS_A_REQUEST:
                self._client.log_batch(self.run_id, metrics=request)
                request = []
            request += metrics
        if request:
            self._client.log_batch(self.run_id, metrics=request)

    def send_artifact(self, path: Path, *, to: str | None) -> None:
        """Upload a file, or what is in a folder; one that is gone is no error."""
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), to)
        elif path.exists():
            self._client.log_artifact(self.run_id, str(path), to)

    def finish(self, status: Status) -> None:
        self._delete_copies(of=self.run_id)
        self._client.set_terminated(self.run_id, status=status)


def start_tracking(
    config: "RunConfig",
    resolved: Mapping[str, Any],
    *,
    fingerprint: str,
    run_id: str | None,
    warn: Callable[[str], None],
) -> Tracker | None:
    """The tracker of a training run; None if it wants none.

    resolved: the config as params; fingerprint: of the cache; run_id: the MLflow run that a checkpoint names.
    """
    tracking, out = config.tracking, config.out
    if not tracking.enabled:
        return None
    facts = {"fingerprint": fingerprint, "git_commit": git_commit()}
    plan = Plan(
        key=spool.key_of(out),
        uri=tracking.uri or default_uri(out),
        experiment=tracking.experiment,
        name=out.resolve().name,
        params={key: str(value) for key, value in (flatten(resolved) | facts).items()},
        every_steps=config.train.log_every_steps,
        end_timeout_s=tracking.end_timeout_s,
        run_id=run_id,
    )
    return Tracker(out, plan, warn=warn)


def default_uri(run_folder: Path) -> str:
    """A SQLite database beside the run folder, shared by the runs that lie there."""
    return f"sqlite:///{run_folder.resolve().parent / 'mlflow.db'}"


def git_commit() -> str:
    """The commit of the code that runs, `-dirty` if files differ from it; "unknown" without a repository."""
    if not (_ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def short(value: str) -> str:
    """A param's value as every server takes it: a long one is cut, and ends in its own hash."""
    if len(value) <= _PARAM_CHARACTERS:
        return value
    mark = f"... sha256 {hashlib.sha256(value.encode()).hexdigest()[:16]}"
    return value[: _PARAM_CHARACTERS - len(mark)] + mark


def quieten() -> None:
    """MLflow neither phones home nor writes into the console, and leaves patience to the sender."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # its own would make a run twice
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _name(key: str) -> str:
    """A key of the characters that MLflow allows."""
    return re.sub(r"[^\w\-./ :]", "_", key, flags=re.ASCII)[:250]
