"""MLflow without any influence on training: one MLflow run per training run, also after restarts.

Training starts a process that sends (trainer/track/sender.py) and writes files; it never waits for a server, and loses
nothing to one. Nothing here imports MLflow.
"""

import os
import subprocess
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowmask.models.errors import CheckpointError
from flowmask.models.process import python_module
from flowmask.models.safe.secrets import URI_VARIABLE, lacks, masked_uri, revealed_uri
from flowmask.trainer.state.provenance import ROOT, git_commit
from flowmask.trainer.state.run_folder import TRACKING, RunFolder, flatten
from flowmask.trainer.track import database, spool
from flowmask.trainer.track.spool import Status, TrackingPlan

if TYPE_CHECKING:
    from flowmask.trainer.config import RunConfig

DONE, LEFT = 0, 3  # exit codes of the sender: the server has everything; it has not

_RESTART_S = 30.0


class Tracker:
    """Training's end of the wire: starts the sender, and tells it by a closed pipe that the run has ended.

    The sender is a separate process, so neither MLflow's imports nor its waiting take the interpreter from a
    step. It ends by itself when training dies in any way, and marks the run FAILED then.
    """

    def __init__(self, folder: Path, plan: TrackingPlan, *, warn: Callable[[str], None]) -> None:
        """Write the plan to the run folder and return at once."""
        self._folder, self._plan, self._warn = folder, plan, warn
        self._uri = database.absolute(revealed_uri(plan.uri))
        self._server = masked_uri(self._uri)
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
        return spool.read_sent(self._folder, uri=self._server).run_id or self._plan.run_id

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
            self._warn(f"{self._folder} can't be written for MLflow ({error.strerror}); training continues")

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
            command = f"flowmask track {self._folder}" + (" --uri URI" if lacks(masked_uri(self._plan.uri)) else "")
            self._warn(f"MLflow at {self._server} has not accepted everything; `{command}` sends the rest{or_start}")

    def _supervise(self) -> None:
        """Keep a sender alive, and pass on what it says."""
        while True:
            with self._lock:
                process = self._process = _start_sender(
                    self._folder, self._uri, timeout_s=self._plan.end_timeout_s, parent=os.getpid()
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


def replay(folder: Path, *, timeout_s: float, warn: Callable[[str], None], uri: str | None = None) -> bool:
    """Send what an ended run has left and set its status; whether the server has everything now.

    uri: the server; None: the one that the run's own start named, if that was this user's. A run that died without a
    word is FAILED. CheckpointError if the run was never tracked, or is being trained: then it sends by itself.
    """
    server = _server_of(folder, named=uri)
    RunFolder(folder, patience_s=0).close()
    process = _start_sender(folder, server, timeout_s=timeout_s)
    assert process.stdout is not None
    for line in process.stdout:
        warn(line.rstrip("\n"))
    return process.wait() == DONE


def track_group(
    folder: Path,
    runs: Sequence[Path],
    *,
    name: str,
    step: int,
    metrics: Mapping[str, float],
    artifacts: Sequence[Path],
    warn: Callable[[str], None],
) -> bool | None:
    """One MLflow run above those of training runs that have ended, at the server of the first; None if none is tracked.

    folder: a separate one, where the run is remembered; step: at which `metrics` were measured.
    Returns whether the server has everything.
    """
    plans = [plan for run in runs if (plan := spool.read_plan(run)) is not None and spool.is_plan_ours(run, plan)]
    if not plans:
        return None
    RunFolder(folder, patience_s=0).close()  # makes it one of ours
    first = plans[0]
    kept = {"uri", "experiment", "end_timeout_s", "asked"}
    plan = TrackingPlan(
        **first.model_dump(include=kept),
        key=spool.key_of(folder),
        name=name,
        status="FINISHED",
        folder=str(folder.resolve()),
        children=tuple(one.key for one in plans if one.uri == first.uri),
    )
    spool.write_plan(folder, plan)
    spool.add_metrics(folder, step, metrics)
    for path in artifacts:
        spool.add_artifact(folder, path, to=None)
    return replay(folder, timeout_s=first.end_timeout_s, warn=warn)


def _server_of(folder: Path, *, named: str | None) -> str:
    """Where to send an ended run; CheckpointError where this user did not name the server, or it can't be known."""
    plan = spool.read_plan(folder)
    if plan is None:
        raise CheckpointError(
            f"{folder} has no readable {TRACKING}: it is no run, or was trained with tracking.enabled=false"
        )
    if (other := spool.copied_from(folder)) is not None:
        raise CheckpointError(
            f"{folder} is a copy of {other}, and its MLflow run belongs to that one; the same training goes on here as "
            "a new MLflow run"
        )
    if named is not None:
        return database.absolute(named)
    ask = f"to send it to a server that you know: flowmask track {folder} --uri URI"
    if not spool.is_plan_ours(folder, plan):
        raise CheckpointError(f"{folder} was not started by you: its {TRACKING} names {masked_uri(plan.uri)}; {ask}")
    if lacks(plan.uri):
        raise CheckpointError(f"{folder} has no password or query of {plan.uri}, as none is stored; {ask}")
    return _server(None, folder, earlier=plan) if plan.asked is None else revealed_uri(plan.uri)


def offer_artifact(run: str | Path, path: Path, *, to: str) -> bool:
    """Leave a file or folder that was made from a run for its MLflow run; whether `run` is one that this user tracks.

    A run in training uploads it at once, one that has ended with `replay`.
    """
    if tracked := _is_tracked(Path(run)):
        spool.add_artifact(Path(run), path, to=to)
    return tracked


def offer_metrics(run: str | Path, step: int, metrics: Mapping[str, float]) -> bool:
    """Leave numbers that were measured of a run's checkpoint for its MLflow run, as `offer_artifact` leaves files.

    Of a number that was left before at this step the first one stays.
    """
    if tracked := _is_tracked(Path(run)):
        spool.add_metrics(Path(run), step, metrics)
    return tracked


def _is_tracked(folder: Path) -> bool:
    plan = spool.read_plan(folder)
    return plan is not None and spool.is_plan_ours(folder, plan)


def _start_sender(folder: Path, uri: str, *, timeout_s: float, parent: int | None = None) -> subprocess.Popen[str]:
    """`python -m flowmask.trainer.track.sender`: its session is its own, so that a terminal's ^C does not reach it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment = os.environ | alone | {"PYTHONPATH": path, URI_VARIABLE: uri}
    who = [str(parent)] if parent is not None else []
    return subprocess.Popen(
        python_module("flowmask.trainer.track.sender", folder, timeout_s, *who),
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


def start_tracking(
    config: "RunConfig", *, fingerprint: str, resumed: bool, run_id: str | None, warn: Callable[[str], None]
) -> Tracker | None:
    """The tracker of a training run; None if it wants none.

    What begins without a checkpoint, and a copied folder, is a new MLflow run.
    fingerprint: of the cache; run_id: the MLflow run that a checkpoint names, needed where `tracking.json` is lost.
    """
    tracking, out = config.tracking, config.out
    if not tracking.enabled:
        return None
    earlier, other = spool.read_plan(out), spool.copied_from(out)
    if other is not None:
        warn(f"{out} is a copy of {other}, which is still there: from here on it is a new MLflow run")
    new = not resumed or other is not None
    if new:
        spool.forget(out)
    facts = {"fingerprint": fingerprint, "git_commit": git_commit()}
    plan = TrackingPlan(
        key=uuid.uuid4().hex if new else spool.key_of(out),
        uri=_server(tracking.uri, out, earlier=None if new else earlier),
        experiment=tracking.experiment,
        name=out.resolve().name,
        params={key: str(value) for key, value in (flatten(config.model_dump(mode="json")) | facts).items()},
        every_steps=config.train.log_every_steps,
        end_timeout_s=tracking.end_timeout_s,
        run_id=None if new or earlier is not None else run_id,
        asked=tracking.uri,
        folder=str(out.resolve()),
    )
    return Tracker(out, plan, warn=warn)


def _server(asked: str | None, out: Path, *, earlier: TrackingPlan | None) -> str:
    """The server that a config means. A database that it names by a relative path, or not at all, is the first start's.

    So it is the same one from any working folder, and after the run was moved; unless it is gone.
    """
    uri = default_uri(out) if asked is None else database.absolute(asked)
    if earlier is None or earlier.asked != asked or (asked is not None and uri == asked):
        return uri
    before = database.file_of(earlier.uri)
    return earlier.uri if before is not None and before.exists() else uri


def default_uri(run_folder: Path) -> str:
    """A SQLite database beside the run folder, shared by the runs that lie there."""
    return f"sqlite:///{run_folder.resolve().parent / 'mlflow.db'}"
