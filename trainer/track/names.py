"""MLflow's names for the numbers of a run: the only table of names.

        train/<name>                      loss, learning rate, gradient norm, and the objective's numbers
        eval/<name>                       evaluations during training
    test/<dataset>/<split>/<name>     scores of `flowmask evaluate`
    system/<name>                     speed and memory

metrics.jsonl, evaluations.jsonl and scores.json keep the short names of the first version, so a run of any version
is read, continued and sent with the same table.
"""

import re

STEP = "train/step"  # a metric whose value is its step: the latest value shows how far the run was sent
OLDER_STEP = "step"  # its name in versions without groups

_SPEED = {"examples_per_s", "tokens_per_s", "model_tflop_per_s", "mfu_pct", "data_wait_pct"}
_MEMORY = {"host_memory_gib", "device_memory_gib", "device_memory_peak_gib"}
_SYSTEM = _SPEED | _MEMORY | {"step_s_p50", "step_s_p90", "step_s_p99"}
_EVALUATION = "eval_"
_CHARACTERS = 250  # MLflow's limit


def mlflow_name(key: str) -> str:
    """MLflow's name for the number `key` of a run's files; a name with a group is unchanged."""
    if "/" in key:
        return allowed(key)
    if key in _SYSTEM:
        return f"system/{key}"
    if key.startswith(_EVALUATION):
        return allowed(f"eval/{key.removeprefix(_EVALUATION)}")
    return allowed(f"train/{key}")


def scores_group(dataset: str, split: str, *, videos: int | None = None) -> str:
    """The group of a dataset's scores; videos: number of scored videos from the start; None: all."""
    some = "" if videos is None else f"_first_{videos}"
    parts = [part for part in f"{dataset}/{split}{some}".split("/") if part.strip(".")]
    return "/".join(["test", *(re.sub(r"[^\w.-]+", "_", part, flags=re.ASCII) for part in parts)])


def allowed(key: str) -> str:
    """A key with only the characters that MLflow allows."""
    return re.sub(r"[^\w\-./ :]", "_", key, flags=re.ASCII)[:_CHARACTERS]
