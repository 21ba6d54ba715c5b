"""Data for a server beside a run's numbers: the run above it, requested weights, older names."""

import json
from pathlib import Path
from typing import Any

import pytest
from sending import rows, sent

from flowmask.models.errors import CheckpointError
from flowmask.trainer.track import mlflow_run, spool, tracking
from flowmask.trainer.track.groups import begin_group
from flowmask.trainer.track.tracking import ask_for_weights

pytestmark = pytest.mark.usefixtures("at_home")


def runs_of(uri: str) -> dict[str, Any]:
    """The runs of the experiment by the first word of their names."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("flowmask")
    found = client.search_runs([experiment.experiment_id])
    by_name = {run.info.run_name.split()[0]: run for run in found}
    assert len(by_name) == len(found)
    return by_name


def test_the_stages_of_a_curriculum_are_children_of_one_run_that_ends_with_it(planned: Any, tmp_path: Path) -> None:
    group, settings = tmp_path / "curriculum" / "mlflow", {}
    for name in ("first", "second"):
        out = tmp_path / "runs" / name
        rows(out)
        settings = {"tracking.parent": str(group), "tracking.stage": f"stage_{name}"}
        if name == "first":
            begin_group(group, [planned.config(out, **settings)], name="curriculum", command="c", say=pytest.fail)
        plan = planned(out, resumed=False, **settings)
        assert plan.tags["stage"] == f"stage_{name}"
        assert sent(out) == (tracking.DONE, [])
    found = runs_of(plan.uri)
    assert found.keys() == {"curriculum", "stage_first", "stage_second"}
    above = found["curriculum"].info
    for name in ("stage_first", "stage_second"):
        assert found[name].data.tags["mlflow.parentRunId"] == above.run_id
    assert above.status == "RUNNING"
    ended = spool.read_plan(group)
    assert ended is not None
    spool.write_plan(group, ended.model_copy(update={"status": "FINISHED", "ended_ms": ended.started_ms + 5000}))
    assert sent(group) == (tracking.DONE, [])
    assert sent(out) == (tracking.DONE, [])  # later scores do not reopen the run above
    above = runs_of(plan.uri)["curriculum"].info
    assert (above.status, above.end_time - above.start_time) == ("FINISHED", 5000)


def test_a_parent_that_nobody_planned_is_told_and_holds_up_nothing(planned: Any, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    rows(out)
    plan = planned(out, resumed=False, **{"tracking.parent": str(tmp_path / "nowhere")})
    code, said = sent(out)
    assert code == tracking.DONE and len(said) == 1 and "nowhere holds no tracking.json of yours" in said[0]
    assert runs_of(plan.uri)["a"].data.metrics["train/step"] == 3


def test_weights_are_uploaded_only_when_they_are_asked_for(planned: Any, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    rows(out)
    planned(out, resumed=False)
    with pytest.raises(CheckpointError, match=r"`flowmask export .*a` writes one"):
        ask_for_weights(out)
    export = tmp_path / "elsewhere" / "step_3"
    export.mkdir(parents=True)
    (export / "model.safetensors").write_bytes(b"weights")
    secret = tmp_path / "secret"
    secret.write_text("mine")
    tracking.offer_artifact(out / "checkpoints" / "step_00000003", export, to="weights/step_3", weights=True)
    with (out / spool.OUTBOX).open("a") as file:  # a line of another user
        file.write(json.dumps({"artifact": str(secret), "to": "x", "mark": "", "weights": True}) + "\n")
    assert sent(out) == (tracking.DONE, [])
    uploads = tmp_path / "runs" / "mlflow_artifacts"
    assert not list(uploads.rglob("model.safetensors"))
    ask_for_weights(out)
    assert sent(out) == (tracking.DONE, [])
    (file,) = uploads.rglob("model.safetensors")
    assert file.parent.relative_to(uploads).parts[-2:] == ("weights", "step_3") and not list(uploads.rglob("secret"))


def test_a_run_of_a_version_without_groups_is_sent_once_more_whole_by_todays_names(
    planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs" / "a"
    rows(out)
    plan = planned(out, resumed=False)
    spool.add_metrics(out, 2, {"eval_jf": 7.0})
    with monkeypatch.context() as older:
        older.setattr(mlflow_run, "mlflow_name", lambda key: key)
        older.setattr(mlflow_run, "STEP", "step")
        assert sent(out) == (tracking.DONE, [])
    assert runs_of(plan.uri)["a"].data.metrics.keys() == {"step", "loss", "skipped_steps", "eval_jf"}
    rows(out, range(4, 6))
    planned(out)
    for _ in range(2):
        assert sent(out) == (tracking.DONE, [])
    run = runs_of(plan.uri)["a"]
    from mlflow.tracking import MlflowClient

    history = MlflowClient(tracking_uri=plan.uri).get_metric_history
    assert [point.step for point in history(run.info.run_id, "train/loss")] == [1, 2, 3, 4, 5]
    assert [point.value for point in history(run.info.run_id, "eval/jf")] == [7.0]
    assert [point.step for point in history(run.info.run_id, "loss")] == [1, 2, 3]
