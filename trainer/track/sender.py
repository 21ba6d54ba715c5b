"""The process that sends to MLflow: run as a module with RUN TIMEOUT_S [PID], started by tracking.py.

With the training's process id it follows the run until its standard input closes or that process is gone. Without
it, it sends the unsent data of an ended run. It retries without limit during training, and for TIMEOUT_S afterwards.
Errors that waiting can't repair are reported at once and delay nothing else. The server comes in an environment
variable, because files hold no secrets. Its standard output goes to the run's log.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from flowmask.models.errors import UserError
from flowmask.models.process import STOP_SIGNALS
from flowmask.models.safe.secrets import URI_VARIABLE, masked_uri, revealed_uri, without_secrets
from flowmask.models.safe.signature import signature
from flowmask.trainer.track import spool
from flowmask.trainer.track.database import is_lasting
from flowmask.trainer.track.mlflow_run import MlflowRun, watch_node
from flowmask.trainer.track.points import StepPoints
from flowmask.trainer.track.spool import Note, Outbox, Status, TrackingPlan
from flowmask.trainer.track.tracking import DONE, LEFT

_POINTS = 40  # a request holds up to 1000 metrics
_LOOK_EVERY_S = 1.0
_RETRY_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
_LASTING_S = 300.0  # wait after an error that needs a person
_QUIET_S = 600.0  # between two reports of a server with repeated outages
_REASON_CHARACTERS = 600

T = TypeVar("T")


class Deadline:
    """The end of the training run; after it `end_timeout_s` remain, even if something hangs."""

    def __init__(self, *, timeout_s: float, parent: int | None) -> None:
        self._timeout_s, self._parent = timeout_s, parent
        self.reached = threading.Event()
        if parent is None:
            self._reach()
        else:
            threading.Thread(target=self._watch, args=(parent,), daemon=True).start()

    def _watch(self, parent: int) -> None:
        """A closed input or another parent process: training has ended or died."""
        while os.getppid() == parent:
            ready, _, _ = select.select([sys.stdin], [], [], 1.0)
            if ready and not os.read(sys.stdin.fileno(), 4096):
                break
        self._reach()

    def _reach(self) -> None:
        watchdog = threading.Timer(self._timeout_s, os._exit, args=(LEFT,))
        watchdog.daemon = True
        watchdog.start()
        self.reached.set()


class GivenUpError(Exception):
    """The run has ended, and the rest can't be sent in the present state."""


class Sender:
    """Sends one run folder's points, notes and status; repeats each until the server has it."""

    def __init__(self, folder: Path, plan: TrackingPlan, end: Deadline, say: Callable[[str], None]) -> None:
        self._folder, self._plan, self._end, self._say = folder, plan, end, say
        self._server = masked_uri(plan.uri)
        self._last_report = -_QUIET_S
        self._reported = False
        self._told = set[str]()
        self._refused = 0

    def run(self) -> int:
        """DONE, or LEFT if the server refuses something for good."""
        try:
            self._send_all()
        except GivenUpError:
            return LEFT
        return LEFT if self._refused else DONE

    def _send_all(self) -> None:
        mlflow_run = self._patiently(lambda: MlflowRun(self._folder, self._plan, say=self._say))
        if not self._end.reached.is_set():
            watch_node(mlflow_run.uri, mlflow_run.run_id)
        self._attempt(mlflow_run, mlflow_run.send_datasets, "the datasets of the run")
        if self._plan.parent:
            self._attempt(mlflow_run, partial(self._join, mlflow_run, Path(self._plan.parent)), "the run's parent")
        after = self._patiently(mlflow_run.last_step)
        steps = StepPoints(self._folder, every_steps=self._plan.every_steps, after=after)
        outbox = Outbox(self._folder, offset=mlflow_run.sent.outbox_bytes)
        while True:
            final = self._end.reached.is_set()  # read before looking: then no later data can be missed
            points = steps.take(_POINTS, final=final)
            if points:
                self._patiently(partial(mlflow_run.send_steps, points))
            self._send_notes(mlflow_run, outbox)
            if final and not points:
                break
            if not points:
                self._end.reached.wait(_LOOK_EVERY_S)
        self._patiently(lambda: mlflow_run.finish(*_final_state(self._folder, steps)))

    def _join(self, mlflow_run: MlflowRun, folder: Path) -> None:
        """Make the run a child of the run of `folder`, which the first child makes on the server."""
        if mlflow_run.is_below():
            return
        plan = spool.read_plan(folder)
        if plan is None or not spool.is_plan_ours(folder, plan):
            raise UserError(
                f"{folder} holds no tracking.json of yours: a curriculum writes it, and sets tracking.parent"
            )
        plan = plan.model_copy(update={"uri": self._plan.uri, "experiment": self._plan.experiment})
        with spool.only_sender(folder):
            mlflow_run.put_below(MlflowRun(folder, plan, say=self._say, begins=False))

    def _send_notes(self, mlflow_run: MlflowRun, outbox: Outbox) -> None:
        for note in outbox.take():
            point = note.point
            if point is not None and point.metrics:
                what = f"the metrics of step {point.step}"
                self._refused += not self._attempt(mlflow_run, partial(mlflow_run.send_note, point), what)
            elif note.artifact is not None:
                self._send_artifact(mlflow_run, note, note.artifact)
            mlflow_run.note_sent(note.end)

    def _send_artifact(self, mlflow_run: MlflowRun, note: Note, path: Path) -> None:
        if note.weights:
            return
        if not note.may_go:
            self._refused += 1
            self._say(f"{path} is not sent: it is outside of {self._folder}, and none of your commands registered it")
        elif not path.exists():
            self._say(f"{path} was deleted before it was uploaded to MLflow")
        else:
            send = partial(mlflow_run.send_artifact, path, to=note.to)
            self._refused += not self._attempt(mlflow_run, send, str(path))

    def _attempt(self, mlflow_run: MlflowRun, call: Callable[[], object], what: str) -> bool:
        """Send something. If the server of an intact run refuses it for good: report it, skip it, return False."""

        def once() -> Exception | None:
            try:
                call()
            except Exception as error:
                if not is_lasting(error) or not mlflow_run.is_active():
                    raise
                return error
            return None

        refused = self._patiently(once)
        if refused is not None:
            self._say(f"MLflow at {self._server} refuses {what}: {self._reason(refused)}")
        return refused is None

    def _patiently(self, call: Callable[[], T]) -> T:
        """Result of `call`, repeated until it succeeds; after the end the watchdog limits the time.

        GivenUpError at once if the run has ended and waiting can't repair the error.
        """
        attempt = 0
        while True:
            try:
                value = call()
            except Exception as error:  # noqa: BLE001 - training continues after any fault of a server
                lasting = is_lasting(error)
                report = self._report_fault if lasting else self._report_outage
                report(error)
            else:
                self._report_return()
                return value
            ended = self._end.reached.is_set()
            if lasting and ended:
                raise GivenUpError
            wait_s = _LASTING_S if lasting else _RETRY_S[min(attempt, len(_RETRY_S) - 1)]
            attempt += 1
            if self._end.reached.wait(0.5 if ended else wait_s) and not lasting:
                time.sleep(0.5)

    def _reason(self, error: Exception) -> str:
        return f"{type(error).__name__}: {without_secrets(str(error), uri=self._plan.uri)}"

    def _report_fault(self, error: Exception) -> None:
        """Report an error that a person must fix: complete, and once."""
        reason = self._reason(error)
        if reason not in self._told:
            self._told.add(reason)
            self._say(
                f"MLflow at {self._server} can't take this run: {reason}; training continues, and nothing is lost: "
                f"once this is fixed, the data is sent, at the latest by `flowmask track {self._folder}`"
            )

    def _report_outage(self, error: Exception) -> None:
        if self._reported or time.monotonic() - self._last_report < _QUIET_S:
            return
        self._reported, self._last_report = True, time.monotonic()
        reason = self._reason(error)[:_REASON_CHARACTERS]
        self._say(
            f"MLflow at {self._server} can't be reached ({reason}); training continues, metrics.jsonl has everything "
            "and will be sent"
        )

    def _report_return(self) -> None:
        if self._reported:
            self._reported = False
            self._say(f"MLflow at {self._server} answers again")


def _final_state(folder: Path, steps: StepPoints) -> tuple[Status, int | None]:
    """Status and time that training wrote at its end; without them it died after its last row."""
    plan = spool.read_plan(folder)
    status: Status = "FAILED" if plan is None or plan.status == "RUNNING" else plan.status
    return status, plan.ended_ms if plan is not None and plan.ended_ms is not None else steps.last_ms


def main(folder: Path, timeout_s: float, parent: int | None) -> int:
    """Send until everything is sent (DONE) or time is up (LEFT)."""
    for number in (*STOP_SIGNALS, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a scheduler signals all processes; the training decides about its end
    os.nice(5)
    plan = spool.read_plan(folder)
    if plan is None:
        return LEFT
    if parent is None and not spool.is_plan_ours(folder, plan):  # another user's plan may name a wrong run
        plan = plan.model_copy(
            update={"key": f"{plan.key[:32]}-{signature('key', plan.key)[:16]}", "run_id": None, "parent": ""}
        )
    plan = plan.model_copy(update={"uri": os.environ.get(URI_VARIABLE) or revealed_uri(plan.uri)})
    end = Deadline(timeout_s=timeout_s, parent=parent)
    with spool.only_sender(folder):
        return Sender(folder, plan, end, _voice()).run()


def _voice() -> Callable[[str], None]:
    """Writes lines to standard output, which MLflow must not use and whose reader may be gone."""
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - to the end of the process

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # training is gone
            pipe.write(line + "\n")

    return say


if __name__ == "__main__":
    # not sys.exit: a hanging thread of MLflow must not keep this process alive
    os._exit(main(Path(sys.argv[1]).resolve(), float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None))
