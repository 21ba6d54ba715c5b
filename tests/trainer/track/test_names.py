"""Every number of a run has one name in MLflow, in its group, and is on one page."""

import pytest

from flowmask.trainer.track.names import mlflow_name, scores_group
from flowmask.trainer.track.plans import page_of


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("loss", "train/loss"),
        ("loss_at_video", "train/loss_at_video"),
        ("skipped_steps", "train/skipped_steps"),
        ("of my objective (ü)", "train/of my objective ___"),
        ("eval_jf", "eval/jf"),
        ("eval_whole_mevis_n_acc", "eval/whole_mevis_n_acc"),
        ("mfu_pct", "system/mfu_pct"),
        ("step_s_p99", "system/step_s_p99"),
        ("device_memory_peak_gib", "system/device_memory_peak_gib"),
        ("test/mevis/valid_u/jf", "test/mevis/valid_u/jf"),
    ],
)
def test_a_number_of_a_runs_files_has_one_name_in_a_group(key: str, name: str) -> None:
    assert mlflow_name(key) == name == mlflow_name(name)


def test_scores_are_grouped_by_dataset_and_split_and_those_of_a_part_say_so() -> None:
    assert scores_group("mevis", "valid_u") == "test/mevis/valid_u"
    assert scores_group("refcoco", "refcoco/unc/testA") == "test/refcoco/refcoco/unc/testA"
    assert scores_group("mevis", "valid_u", videos=5) == "test/mevis/valid_u_first_5"
    assert scores_group("my set", "../..//a b") == "test/my_set/a_b"


@pytest.mark.parametrize(
    ("uri", "page"),
    [
        ("http://h:5000/", "http://h:5000/#/experiments/1/runs/r?workflowType=machine_learning"),
        ("https://u:Mark3r@h/x?token=Mark3r", "https://***@h/x/#/experiments/1/runs/r?workflowType=machine_learning"),
        (
            "sqlite:////a b/mlflow.db",
            "`mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'`, "
            "then open http://127.0.0.1:5000/#/experiments/1/runs/r?workflowType=machine_learning",
        ),
        ("databricks", ""),
    ],
)
def test_the_page_of_a_run_can_be_opened_and_holds_no_secret(uri: str, page: str) -> None:
    assert page_of(uri, experiment_id="1", run_id="r") == page
    assert page_of(uri, experiment_id=None, run_id="r") == ""
