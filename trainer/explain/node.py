"""Sends MLflow's system metrics of a machine without rank 0; its first rank starts this process.

Run as a module with RUN PID, it ends with the process PID. On rank 0's machine the sender does this. Only the sender
writes to a database in a file; a server gets the metrics of every machine.
"""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowmask.models.process import STOP_SIGNALS
from flowmask.models.safe.secrets import URI_VARIABLE, masked_uri, revealed_uri
from flowmask.trainer.config import TrackingConfig
from flowmask.trainer.track import spool
from flowmask.trainer.track.tracking import start_module

_LOOK_EVERY_S = 5.0


@contextmanager
def node_watched(run: Path, tracking: TrackingConfig, *, rank: int) -> Iterator[None]:
    """Inside the block, MLflow gets this machine's system metrics, if this rank is responsible."""
    first_here = rank > 0 and os.environ.get("LOCAL_RANK") == "0"
    uri = revealed_uri(tracking.uri) if first_here and tracking.enabled and tracking.uri else ""
    if not uri.startswith(("http://", "https://")):
        yield
        return
    process = start_module("flowmask.trainer.explain.node", run, os.getpid(), uri=uri)
    try:
        yield
    finally:
        process.kill()  # it has nothing to finish
        process.wait()


def main(run: Path, parent: int) -> None:
    """Send to the MLflow run made by the sender, until the parent is gone."""
    for number in (*STOP_SIGNALS, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    from flowmask.trainer.track.mlflow_run import watch_node

    uri, watched = os.environ[URI_VARIABLE], set[str]()
    while os.getppid() == parent:
        known = spool.read_sent(run, uri=masked_uri(uri)).run_id
        if known is not None and known not in watched:  # the watch of an earlier run ends by itself
            watched.add(known)
            watch_node(uri, known)
        if select.select([sys.stdin], [], [], _LOOK_EVERY_S)[0]:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # a hanging thread of MLflow must not keep this process alive
