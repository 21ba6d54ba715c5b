"""MLflow's system metrics contain each machine's load under its name."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import wait_until

from flowmask.models.safe.secrets import URI_VARIABLE
from flowmask.trainer.config import TrackingConfig
from flowmask.trainer.explain import node
from flowmask.trainer.track import spool
from flowmask.trainer.track.spool import Sent

ROOT = Path(__file__).parents[3]


def test_a_machine_without_rank_zero_is_in_the_run_under_its_name(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    run_id = client.create_run("0").info.run_id
    words = [sys.executable, "-m", "flowmask.trainer.explain.node", str(tmp_path), str(os.getpid())]
    quick = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2", URI_VARIABLE: uri, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=os.environ | quick, stdin=subprocess.PIPE)
    try:
        spool.write_sent(tmp_path, Sent(uri=uri, run_id=run_id))  # as the sender does after it has created the run
        name = f"system/{os.uname().nodename}/cpu_utilization_percentage"
        wait_until(lambda: name in client.get_run(run_id).data.metrics, name)
        assert process.poll() is None
        process.communicate(timeout=60)  # closes its input, as the end of the rank does
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("rank", "local", "uri", "starts"),
    [
        (8, "0", "http://127.0.0.1:1", True),
        (0, "0", "http://127.0.0.1:1", False),  # the sender runs there
        (9, "1", "http://127.0.0.1:1", False),
        (8, "0", "sqlite:///m.db", False),
        (8, "0", None, False),
    ],
)
def test_one_process_a_machine_feeds_a_server_and_none_a_file(
    rank: int, local: str, uri: str | None, starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def start(*words: object, uri: str) -> Any:
        started.append((*words, uri))
        return subprocess.Popen(["sleep", "600"])

    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(node, "start_module", start)
    with node.node_watched(tmp_path, TrackingConfig(uri=uri), rank=rank):
        assert len(started) == starts
    assert all(words == ("flowmask.trainer.explain.node", tmp_path, os.getpid(), uri) for words in started)
