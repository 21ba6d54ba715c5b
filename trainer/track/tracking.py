"""MLflow without influence on training: one MLflow run per training run, also after restarts.

Training writes files and starts a sending process (trainer/track/sender.py). It never waits for a server, and a
server's fault loses no data. Nothing here imports MLflow.
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
from flowmask.trainer.track.plans import RunFacts, page_of, plan_of_run, server_for
from flowmask.trainer.track.spool import Status, TrackingPlan

if TYPE_CHECKING:
    from flowmask.trainer.config import RunConfig

DONE, LEFT = 0, 3  # exit codes of the sender: everything was sent; something was not

_RESTART_S = 30.0


class Tracker:
    """Training's side: starts the sender, and tells it by a closed pipe that the run has ended.

    The sender is a separate process, so MLflow's imports and waiting never delay a step. If training dies, the
    sender ends by itself and marks the run FAILED.
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
        """MLflow's id of the run; None until the server has assigned one."""
        return spool.read_sent(self._folder, uri=self._server).run_id or self._plan.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics that are not a training step's; those come from metrics.jsonl."""
        self._write(lambda: spool.add_metrics(self._folder, step, metrics))

    def artifact(self, path: Path, *, to: str | None = None) -> None:
        """Upload a file or folder later to the artifact folder `to`; it is read when it is sent."""
        self._write(lambda: spool.add_artifact(self._folder, path, to=to))

    def _write(self, call: Callable[[], None]) -> None:
        """A full disk for MLflow's files does not end training."""
        try:
            call()
        except OSError as error:
            self._warn(f"{self._folder} can't be written for MLflow ({error.strerror}); training continues")

    def close(self, status: Status) -> None:
        """Send everything with the final status; gives up after `end_timeout_s`, with one line."""
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
        """Keep a sender running, and log its output."""
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
    """Send the unsent data of an ended run and set its status; returns whether the server has everything now.

    uri: the server; None: the one of the run's own start, if it was this user's. A run that died without writing its
    end is FAILED. CheckpointError if the run was never tracked, or is in training: then it sends by itself.
    """
    server = _server_of(folder, named=uri)
    RunFolder(folder, patience_s=0).close()
    process = _start_sender(folder, server, timeout_s=timeout_s)
    assert process.stdout is not None
    for line in process.stdout:
        warn(line.rstrip("\n"))
    return process.wait() == DONE


def _server_of(folder: Path, *, named: str | None) -> str:
    """The server for an ended run; CheckpointError if this user did not choose it, or it is unknown."""
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
    """Put a file or folder made from a checkpoint into its run's outbox; returns the run folder if you track it.

    A run in training uploads it at once, an ended one with `replay`; weights only after `ask_for_weights`.
    """
    run = tracked_run(checkpoint)
    if run is not None:
        spool.add_artifact(run, path, to=to, weights=weights)
    return run


def offer_metrics(checkpoint: str | Path, step: int, metrics: Mapping[str, float], *, of: str) -> Path | None:
    """Put numbers measured on a checkpoint into its run's outbox, like `offer_artifact` for files.

    of: name of the measurement; earlier numbers of it at this step stay.
    """
    run = tracked_run(checkpoint)
    if run is not None:
        spool.add_metrics(run, step, metrics, of=of)
    return run


def tracked_run(checkpoint: str | Path) -> Path | None:
    """The run folder of a run, of one of its steps or of an export in it, if you track the run."""
    path = Path(checkpoint)
    above = path.parent.parent if path.parent.name in (CHECKPOINTS, "export") else path
    for folder in (path, above):
        plan = spool.read_plan(folder)
        if plan is not None and spool.is_plan_ours(folder, plan):
            return folder
    return None


def ask_for_weights(folder: Path) -> None:
    """Allow sending the weights of a run's exports; CheckpointError if there are none."""
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
    """Send an evaluation's unsent data for an ended run, for at most its end timeout; reports the result in one line.

    A run in training sends it by itself. A fault of MLflow is reported and has no other effect.
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
    """The address of a run's page, or of all runs of its experiment; empty if no server has it."""
    plan = spool.read_plan(folder)
    if plan is None:
        return ""
    sent = spool.read_sent(folder, uri=plan.uri)
    return page_of(plan.uri, experiment_id=sent.experiment_id, run_id=None if experiment else sent.run_id)


def _start_sender(folder: Path, uri: str, *, timeout_s: float, parent: int | None = None) -> subprocess.Popen[str]:
    who = [str(parent)] if parent is not None else []
    return start_module("flowmask.trainer.track.sender", folder, timeout_s, *who, uri=uri)


def start_module(name: str, *words: object, uri: str) -> subprocess.Popen[str]:
    """`python -m NAME WORDS` in a separate session, so that a terminal's ^C does not reach it. uri: of the server."""
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
    """The tracker of a training run; None if tracking is off.

    run_id: the MLflow run named in a checkpoint, needed if `tracking.json` is lost.
    """
    if not config.tracking.enabled:
        return None
    plan = plan_of_run(config, facts, resumed=resumed, run_id=run_id, warn=warn)
    return Tracker(config.out, plan, warn=warn)
