"""One SLURM task: the ranks of one node, and a file that records how they ended.

It also exits with 0 if the job was asked to stop: only a failure may make SLURM end the other nodes.
"""

import json
import os
import signal
import socket
import sys
import time
from datetime import datetime
from pathlib import Path

from flowmask.launch.console import take_over
from flowmask.launch.local.processes import Group, JobFailedError, TooLateError, run_local
from flowmask.launch.slurm import commands as slurm_commands
from flowmask.launch.slurm.submission import NodeEnd, Submission
from flowmask.models.errors import TrainingError, UserError
from flowmask.models.files import write_atomically
from flowmask.models.process import CRASH_EXIT_CODE, MISTAKE_EXIT_CODE, REQUEUE_EXIT_CODE, stop_signals
from flowmask.models.safe.words import printable
from flowmask.models.stored.sealed import parse_json

RENDEZVOUS_S = 300.0
REQUEUE_S = 15.0  # time for the batch script to requeue the job


def run(folder: str) -> None:
    """Run this node's part of a submission. submitit calls it on every node, and pickles it by name."""
    take_over()
    for number in (*stop_signals(), signal.SIGCONT):
        signal.signal(number, lambda *_: None)  # instead of submitit's; the ranks' launcher adds its own
    submission = Submission(Path(folder))
    array, restart, node = array_task(), restart_count(), int(os.environ["SLURM_NODEID"])
    end = _run_ranks(submission, array=array, restart=restart, node=node)
    submission.set_ended(end, array=array, restart=restart, node=node)
    if end.message:
        print(f"flowmask: {printable(end.message)}", file=sys.stderr, flush=True)  # noqa: T201 - it is the log
    if end.code not in (0, REQUEUE_EXIT_CODE):
        sys.exit(end.code)


def array_task() -> int:
    """Index of this array task; 0 without an array."""
    return int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))


def restart_count() -> int:
    """How often SLURM has restarted this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _run_ranks(submission: Submission, *, array: int, restart: int, node: int) -> NodeEnd:
    try:
        kind, resolved = submission.job()
        launch = resolved["launch"]
        processes, nodes = launch["processes_per_node"], launch["nodes"]
        meet, listener = "", None
        if nodes > 1:
            meet, listener = _meet(submission, array=array, restart=restart, node=node)
        group = Group(
            first_rank=(array * nodes + node) * processes,
            world=launch["array"] * nodes * processes,
            meet=meet,
            listener=listener,
            time_to_stop_s=lambda: _time_to_stop_s(launch["signal_margin_s"]),
        )
        return NodeEnd(run_local(kind, resolved, processes=processes, group=group))
    except TooLateError as error:
        return NodeEnd(REQUEUE_EXIT_CODE, f"{error}; launch.signal_margin_s is {launch['signal_margin_s']}")
    except JobFailedError as error:
        message = f"{error.what} on {os.uname().nodename}; see {submission.logs}"
        return NodeEnd(CRASH_EXIT_CODE, message, error.traceback)
    except UserError as error:
        return NodeEnd(MISTAKE_EXIT_CODE, str(error))


def _time_to_stop_s(margin_s: int) -> float | None:
    """Seconds until the job's end, minus the time for a requeue; None if SLURM is already ending it."""
    try:
        facts = slurm_commands.job_facts(os.environ["SLURM_JOB_ID"])
    except UserError:
        return None
    if facts is None or facts.state != "RUNNING" or facts.ends is None:
        return None
    return (facts.ends - datetime.now()).total_seconds() - min(REQUEUE_S, margin_s / 4)


def _meet(submission: Submission, *, array: int, restart: int, node: int) -> tuple[str, socket.socket | None]:
    """Rendezvous of all nodes as ADDRESS:PORT; on the first node also the socket that listens there.

    The first node listens before it publishes the address, so that no other process can take the port in between.
    """
    path = submission.folder / "ended" / f"{array:05d}_{restart:03d}_address.json"
    listener = None
    if node == 0:
        address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")  # srun runs on the first node
        listener = _listen(address)
        write_atomically(path, json.dumps({"address": address, "port": listener.getsockname()[1]}))
    until = time.monotonic() + RENDEZVOUS_S
    while not path.exists():
        if time.monotonic() > until:
            raise TrainingError(
                f"{path} did not appear in {RENDEZVOUS_S:.0f} s; check that all nodes share this folder"
            )
        time.sleep(0.2)
    found = parse_json(path.read_text())
    return f"{found['address']}:{found['port']}", listener


def _listen(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        said = f"SLURM_LAUNCH_NODE_IPADDR is {address}, but {os.uname().nodename} can't listen there"
        raise TrainingError(f"{said} ({error.strerror}): it must be this node's address") from error
