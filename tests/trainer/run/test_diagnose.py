"""A skipped step names the first value that was not finite and its examples; a run without any taken step fails."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_waits import Questions, Scalars
from objective_lab import SilentVelocity, batch_of, make
from runs import broken_cache, run_group, start

from flowmask.data_pipeline.config import LoaderConfig
from flowmask.launch.jobs import TrainJob
from flowmask.models.errors import TrainingError
from flowmask.trainer.run import diagnose
from flowmask.trainer.run.diagnose import Skip, told, useless, why_skipped

NAN = float("nan")


class BrokenVelocity(SilentVelocity):
    """Stands for a DiT whose velocity is NaN for the second example."""

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor]:
        (velocity,) = super().__call__(**inputs)
        velocity[1] = NAN
        return (velocity,)


def skip_of(batch: Any, *, dit: Any, loss: float = NAN) -> Skip:
    batch.example_ids += 70
    objective = make()
    objective.prepare(batch)
    objective.loss(dit, batch)
    result: Any = SimpleNamespace(loss=loss, grad_norm=NAN)
    return why_skipped(result, [batch], loss_limit=9.0)


@pytest.mark.parametrize(
    ("broken", "part"),
    [
        ("video_mean", "latents"),
        ("video_logvar", "latents"),
        ("mask_mean", "latents"),
        ("text", "text"),
        ("eps", "noise"),
    ],
)
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_the_first_thing_that_is_not_finite_is_named_with_its_examples(broken: str, part: str, value: float) -> None:
    batch = batch_of([1, 2, 3])
    batch.draws["eps"] = torch.zeros(3, 16, 1, 1, 1)
    place = batch.draws["eps"] if broken == "eps" else getattr(batch, broken)
    place[2].view(-1)[5] = value
    assert skip_of(batch, dit=BrokenVelocity()) == Skip(f"{part} not finite", (72,))


def test_of_whole_inputs_the_prediction_the_loss_or_the_gradient_is_named() -> None:
    assert skip_of(batch_of([1, 2, 3]), dit=BrokenVelocity()) == Skip("prediction not finite", (71,))
    assert skip_of(batch_of([1, 2, 3]), dit=SilentVelocity()) == Skip("loss not finite")
    assert skip_of(batch_of([1, 2, 3]), dit=SilentVelocity(), loss=1.0) == Skip("gradient not finite")
    for loss, reason in ((5.0, "gradient norm spike"), (10.0, "loss spike")):
        result: Any = SimpleNamespace(loss=loss, grad_norm=1e9)
        assert why_skipped(result, [], loss_limit=9.0) == Skip(reason)


def test_a_loss_asks_its_device_for_nothing() -> None:
    batch, objective = batch_of([1, 2, 3]), make()
    objective.prepare(batch)
    with Scalars() as scalars, Questions() as questions:
        objective.loss(SilentVelocity(), batch)
    assert set(batch.finite) == {"noise", "prediction", "loss"}
    assert not +questions.seen and scalars.seen == 0


def test_skips_are_told_by_reason_and_only_spikes_and_steps_that_counted_blame_the_learning_rate() -> None:
    assert told({}) == "no step skipped"
    assert told({"a": 1, "b": 2}) == "3 steps skipped: 2 b, 1 a"
    data = LoaderConfig.model_validate({"mix": [{"cache": "A"}, {"cache": "B"}]})
    config: Any = SimpleNamespace(out="RUN", guard=SimpleNamespace(max_consecutive_skips=3), data=data)
    for part in diagnose._PARTS:
        never = str(useless(config, {f"{part} not finite": 3}, updates=0))
        assert "train.lr" not in never and "last good" not in never
    assert "lower train.lr" in str(useless(config, {"x": 9}, updates=5, reason="loss spike"))
    said = str(useless(config, {"latents not finite": 3}, updates=0))
    assert "flowmask cache verify A; flowmask cache verify B" in said  # one command for each cache, ready to paste


def test_latents_of_one_example_are_named_on_whichever_rank_they_are(lab: Path, tmp_path: Path) -> None:
    cache = broken_cache(lab, tmp_path / "cache", examples=[3])
    overrides = {"data.cache": str(cache), "train.micro_batch": 2, "train.steps": 4}
    run_group([{"lab": str(lab), "out": str(tmp_path / "run"), "overrides": overrides}], folder=tmp_path / "ranks")
    log = (tmp_path / "run" / "log.txt").read_text()
    skipped = re.findall(r"skipped: (.*?);.*; examples (.*)", log)
    assert skipped and {reason for reason, _ in skipped} == {"latents not finite"}
    assert re.search(r"finished at step 4; (\d) steps? skipped: \1 latents not finite", log)


def test_whatever_shards_the_training_no_rank_says_that_such_a_run_finished(lab: Path, tmp_path: Path) -> None:
    cache = broken_cache(lab, tmp_path / "cache", examples=list(range(16)))
    ways = {
        "zero_2": {"train.zero_stage": 2},
        "zero_3": {"train.zero_stage": 3, "train.precision": "fp32"},
        "tokens": {"train.sequence_parallel": 2, "train.micro_batch": 2},
        "patient": {"train.zero_stage": 2, "guard.max_consecutive_skips": 2},
    }
    common = {"data.cache": str(cache), "train.steps": 3}
    said = r"latents not finite; no step counted, so there are no new weights; check the data: flowmask cache"
    run_group(
        [
            {"lab": str(lab), "out": str(tmp_path / way), "overrides": common | changes, "raises": said}
            for way, changes in ways.items()
        ],
        folder=tmp_path / "ranks",
    )
    for way in ways:
        assert TrainJob.status(tmp_path / way).state != "finished"


@pytest.mark.parametrize("patience", [10, 3])
def test_a_run_of_which_no_step_counted_fails_with_the_reason_and_stays_failed(
    lab: Path, tmp_path: Path, patience: int
) -> None:
    cache = broken_cache(lab, tmp_path / "cache", examples=list(range(16)))
    overrides = {"data.cache": str(cache), "train.steps": 4, "guard.max_consecutive_skips": patience}
    for _ in range(2):
        with pytest.raises(TrainingError) as caught:
            start(lab, tmp_path / "run", overrides)
        assert "latents not finite; no step counted" in str(caught.value)
        assert f"flowmask cache verify {cache}" in str(caught.value)
        assert "train.lr" not in str(caught.value) and "last good" not in str(caught.value)
    assert TrainJob.status(tmp_path / "run").state != "finished"
