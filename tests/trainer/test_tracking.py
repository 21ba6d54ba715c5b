"""MLflow sees one run per training run, and can neither stop nor slow it."""

import socket
import time
from pathlib import Path

from runs import SignalAt, start

from trainer.tracking import Tracker, default_uri

TRACKED = {"tracking.enabled": True, "train.log_every_steps": 1}


def test_one_mlflow_run_across_restarts_with_params_metrics_and_the_right_end(
    lab: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with SignalAt.on_every_run():
        start(lab, out, TRACKED)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(default_uri(out))
    experiment = client.get_experiment_by_name("flowmask")
    assert experiment is not None
    (stopped,) = client.search_runs([experiment.experiment_id])
    assert stopped.info.status == "KILLED"
    start(lab, out, TRACKED)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == stopped.info.run_id and run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == "0.002" and len(run.data.params["fingerprint"]) == 64
    assert {point.step for point in client.get_metric_history(run.info.run_id, "loss")} == set(range(1, 11))
    assert run.data.metrics.keys() >= {"lr", "grad_norm", "examples_per_s", "data_wait_pct", "loss_at_video"}
    start(lab, out, TRACKED | {"train.steps": 11})
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["resumed.train.steps"] == "11"


def test_a_server_that_accepts_and_never_answers_costs_neither_time_nor_life(tmp_path: Path) -> None:
    warnings: list[str] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        started = time.perf_counter()
        tracker = Tracker(
            uri=f"http://127.0.0.1:{server.getsockname()[1]}",
            experiment="flowmask",
            name="run",
            params={"a": 1},
            identity=tmp_path / "tracking.json",
            warn=warnings.append,
        )
        for step in range(20_000):
            tracker.log(step, {"loss": 1.0})
        logged = time.perf_counter() - started
        tracker.close("FINISHED", patience_s=1.0)
        assert logged < 10 and time.perf_counter() - started < 30  # a call that waits would take minutes
    assert any("did not take everything" in warning for warning in warnings)
    assert len(warnings) <= 2 and "\n" not in "".join(warnings)


def test_a_dead_server_is_one_line_in_the_log(lab: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    warnings: list[str] = []
    tracker = Tracker(
        uri=f"http://127.0.0.1:{port}",
        experiment="flowmask",
        name="run",
        params={},
        identity=tmp_path / "tracking.json",
        warn=warnings.append,
    )
    tracker.log(1, {"loss": 1.0})
    tracker.close("FAILED", patience_s=4.0)
    assert sum("can't be reached" in line for line in warnings) == 1 and tracker.run_id is None
