"""MLflow without any influence on training: one MLflow run per training run, also after restarts.

Training starts a process that sends (trainer/track/sender.py) and writes files; it never waits for a server, and loses
nothing to one. Nothing here imports MLflow.
"""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flowmask.models.errors import CheckpointError, UserError
from flowmask.models.folders import locks
from flowmask.models.folders.output_folder import LOCK
from flowmask.models.process import python_module
from flowmask.models.safe.secrets import URI_VARIABLE, lacks, masked_uri, revealed_uri
from flowmask.trainer.state.provenance import ROOT
from flowmask.trainer.state.run_folder import CHECKPOINTS, TRACKING, RunFolder
from flowmask.trainer.track import database, spool
from flowmask.trainer.track.address import page_of
from flowmask.trainer.track.plans import RunFacts, plan_of_run, server_for
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
        ended = self._plan.model_copy(update={"status": status, "ended_ms": int(time.time() * 1000)})
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
        elif page := where_to_look(self._folder):
            self._warn(f"MLflow: {page}")

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
    return server_for(None, folder, earlier=plan) if plan.asked is None else revealed_uri(plan.uri)


def offer_artifact(checkpoint: str | Path, path: Path, *, to: str, weights: bool = False) -> Path | None:
    """Leave a file or folder that was made from a checkpoint for its MLflow run; its run folder, if you track that.

    A run in training uploads it at once, one that has ended with `replay`; weights only when `ask_for_weights` does.
    """
    run = tracked_run(checkpoint)
    if run is not None:
        spool.add_artifact(run, path, to=to, weights=weights)
    return run


def offer_metrics(checkpoint: str | Path, step: int, metrics: Mapping[str, float], *, of: str) -> Path | None:
    """Leave numbers that were measured of a checkpoint for its MLflow run, as `offer_artifact` leaves files.

    of: names the measurement: what it has left before at this step stays.
    """
    run = tracked_run(checkpoint)
    if run is not None:
        spool.add_metrics(run, step, metrics, of=of)
    return run


def tracked_run(checkpoint: str | Path) -> Path | None:
    """The run folder of a run, of one of its steps or of an export in it, if it is one that you track."""
    path = Path(checkpoint)
    above = path.parent.parent if path.parent.name in (CHECKPOINTS, "export") else path
    for folder in (path, above):
        plan = spool.read_plan(folder)
        if plan is not None and spool.is_plan_ours(folder, plan):
            return folder
    return None


def ask_for_weights(folder: Path) -> None:
    """Let the exports that were written of a run be sent; CheckpointError where there are none."""
    notes = spool.Outbox(folder, offset=0).take()
    found = {(note.artifact, note.to): None for note in notes if note.weights and note.may_go}
    there = [(path, to) for path, to in found if path is not None and path.exists()]
    if not there:
        raise CheckpointError(
            f"{folder} has no export whose weights could be sent: `flowmask export {folder}` writes one"
        )
    for path, to in there:
        spool.add_artifact(folder, path, to=to)


def send_left(checkpoint: str | Path, *, say: Callable[[str], None]) -> None:
    """Send what an evaluation has left for an ended run, for as long as its end may wait; one line on how it went.

    A run in training sends it by itself. Whatever is wrong with MLflow is said, and no more than that.
    """
    run = tracked_run(checkpoint)
    if run is None or locks.is_held(run / LOCK):
        return
    plan = spool.read_plan(run)
    assert plan is not None, "tracked_run has read it"
    try:
        done = replay(run, timeout_s=plan.end_timeout_s, warn=say)
    except (UserError, OSError) as error:
        say(f"MLflow: {error}")
        done = False
    say(f"MLflow: {where_to_look(run)}" if done else f"`flowmask track {run}` sends the scores to MLflow")


def where_to_look(folder: Path, *, experiment: bool = False) -> str:
    """The page of a run, or of all runs of its experiment, as a person opens it; empty where no server has it."""
    plan = spool.read_plan(folder)
    if plan is None:
        return ""
    sent = spool.read_sent(folder, uri=plan.uri)
    return page_of(plan.uri, experiment_id=sent.experiment_id, run_id=None if experiment else sent.run_id)


def _start_sender(folder: Path, uri: str, *, timeout_s: float, parent: int | None = None) -> subprocess.Popen[str]:
    who = [str(parent)] if parent is not None else []
    return start_module("flowmask.trainer.track.sender", folder, timeout_s, *who, uri=uri)


def start_module(name: str, *words: object, uri: str) -> subprocess.Popen[str]:
    """`python -m NAME WORDS`: its session is its own, so that a terminal's ^C does not reach it. uri: of the server."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment = os.environ | alone | {"PYTHONPATH": path, URI_VARIABLE: uri}
    return subprocess.Popen(
        python_module(name, *words),
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
    config: "RunConfig", facts: RunFacts, *, resumed: bool, run_id: str | None, warn: Callable[[str], None]
) -> Tracker | None:
    """The tracker of a training run; None if it wants none.

    run_id: the MLflow run that a checkpoint names, needed where `tracking.json` is lost.
    """
    if not config.tracking.enabled:
        return None
    plan = plan_of_run(config, facts, resumed=resumed, run_id=run_id, warn=warn)
    return Tracker(config.out, plan, warn=warn)
