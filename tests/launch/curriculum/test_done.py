"""A stage with a number of epochs is done when its run has had them; for a cache at a URL the run tells."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import make_lab, run_config, start

from flowmask.launch.curriculum.done import Judgement, judge
from flowmask.launch.curriculum.stages import Stage
from flowmask.launch.jobs import TrainJob

EPOCHS = {"train.steps": None, "train.schedule": "multistep", "train.decay_at_epochs": [1]}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lab")
    make_lab(folder)
    return folder


def judged(lab: Path, out: Path, changes: dict[str, Any]) -> Judgement:
    job = TrainJob.model_validate(run_config(lab, out, {**EPOCHS, **changes}).model_dump())
    return judge(Stage("train", job, (), {}, None), unfinished=set(), memo=out.parent / "memo")


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_a_stage_of_epochs_is_done_when_its_run_has_had_as_many(lab: Path, tmp_path: Path, mode: str) -> None:
    out, two = tmp_path / "run", {"data.mode": mode, "train.epochs": 2}
    assert judged(lab, out, two) == Judgement(False, "no checkpoint yet")
    assert start(lab, out, {**EPOCHS, **two}) == 0
    assert judged(lab, out, two) == Judgement(True, "step 4 of 4")
    assert judged(lab, out, {**two, "train.epochs": 3}) == Judgement(False, "at step 4 of 6")
    if mode == "stream":
        at_a_url = {**two, "data.cache": "http://127.0.0.1:9/cache"}
        assert judged(lab, out, at_a_url) == Judgement(True, "step 4 of 4")
        assert judged(lab, out, {**at_a_url, "train.epochs": 3}) == Judgement(False, "at step 4 of 3 epochs")
