"""A run's config refuses impossible settings with the value, the rule and the fix."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flowmask.models.errors import ConfigError
from flowmask.trainer.config import RunConfig, in_todays_terms
from flowmask.trainer.train_config import TrainConfig, accumulation_steps
from flowmask.trainer.validation_config import ValidationConfig


def make(**train: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 10, "global_batch": 12, "micro_batch": 2} | train)


def test_accumulation_is_what_is_left_of_the_global_batch() -> None:
    assert [accumulation_steps(make(), world) for world in (1, 2, 3, 6)] == [6, 3, 2, 1]


def test_a_remainder_names_the_nearest_global_batches_and_micro_batch() -> None:
    with pytest.raises(ConfigError, match=r"is 12; .* 2 x 4 processes = 8\. Nearest: 8 or 16, or .*micro_batch 1"):
        accumulation_steps(make(), 4)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"micro_batch": 5}, "Nearest: 10 or 15, or train.micro_batch 4"),
        ({"zero_stage": 0, "offload_optimizer": True}, "needs train.zero_stage 1, 2 or 3"),
        ({"schedule": "multistep"}, "decay_at_steps is empty"),
        ({"schedule": "multistep", "decay_at_steps": [5, 3]}, "must increase"),
        ({"schedule": "multistep", "decay_at_epochs": [5, 5]}, "decay_at_epochs is .* must increase"),
        ({"decay_at_epochs": [5], "decay_at_steps": [3]}, r"give one and set the other to \[\]"),
        ({"epochs": 2}, "train.steps is 10 and train.epochs is 2; give one and set the other to null"),
        ({"steps": None}, "train.steps is missing; give it, or train.epochs"),
        ({"schedule": "cosine", "warmup_steps": 10}, "below the schedule's 10 steps"),
        ({"betas": [0.9, 1.0]}, r"\[0, 1\)"),
        ({"zero_stage": 4}, "less than or equal to 3"),
        ({"precision": "fp16"}, "'bf16' or 'fp32'"),
        ({"learning_rate": 1}, "Extra inputs"),
        ({"compile": True, "zero_stage": 3}, "compile needs train.zero_stage 0, 1 or 2"),
        ({"compile": True, "sequence_parallel": 2}, "choose one of them"),
        ({"activation_checkpointing": "selective", "zero_stage": 3}, "choose full, or stage 0, 1 or 2"),
        ({"activation_checkpointing": "some"}, "'none', 'selective' or 'full'"),
    ],
)
def test_an_impossible_combination_is_refused_with_the_rule(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**train)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"best": "eval_jf", "jf_examples": 0}, "evaluate.jf_examples is 0"),
        ({"best": "eval_whole_jf"}, "evaluate.whole_videos is null"),
        ({"best": "eval_f"}, "'eval_loss', 'eval_jf' or 'eval_whole_jf'"),
        ({"every_steps": 4, "whole_videos": {"every_steps": 10}}, "every_steps 4. Nearest: 8 or 12"),
        ({"every_steps": 4, "whole_videos": {"every_steps": 2}}, "Nearest: 4"),
        ({"every_epochs": 1, "whole_videos": {"every_steps": 2}}, "evaluate.every_steps is null: give it"),
        ({"whole_videos": {"videos": 0}}, "greater than or equal to 1"),
    ],
)
def test_an_impossible_evaluation_is_refused_with_the_rule(evaluate: dict[str, Any], message: str) -> None:
    if "whole_videos" in evaluate:
        evaluate = {**evaluate, "whole_videos": {"data": {"root": "d"}, **evaluate["whole_videos"]}}
    with pytest.raises(ValidationError, match=message):
        ValidationConfig.model_validate(evaluate)


def test_whole_videos_need_a_dit() -> None:
    tree = {"out": "o", "model": {"wan": "w"}, "data": {"cache": "c"}, "train": {"steps": 1, "global_batch": 8}}
    tree |= {"evaluate": {"whole_videos": {"data": {"root": "d"}}}}
    assert RunConfig.model_validate(tree).evaluate.scores_whole_videos(3)
    with pytest.raises(ValidationError, match=r"evaluate.whole_videos needs a DiT.* set it to null"):
        RunConfig.model_validate({**tree, "objective": {"kind": "mask_decoder"}})


@pytest.mark.parametrize("train", [{"epochs": 3}, {"steps": 3, "decay_at_epochs": [1]}])
def test_epochs_are_those_of_one_cache(train: dict[str, Any]) -> None:
    tree: dict[str, Any] = {"out": "o", "model": {"wan": "w"}, "train": {**train, "global_batch": 8}}
    assert RunConfig.model_validate(tree | {"data": {"cache": "c"}}).train.counts_epochs
    with pytest.raises(ValidationError, match=r"caches of data.mix have different epochs; give train.steps"):
        RunConfig.model_validate(tree | {"data": {"mix": [{"cache": "c"}, {"cache": "d"}]}})


def test_recomputation_may_be_named_or_be_true_or_false() -> None:
    for given, meant in ((True, "full"), (False, "none"), ("selective", "selective")):
        assert make(activation_checkpointing=given).activation_checkpointing == meant


def test_the_defaults_are_the_published_recipe() -> None:
    config = RunConfig.model_validate(
        {"out": "o", "model": {"wan": "w"}, "data": {"cache": "c"}, "train": {"steps": 1, "global_batch": 8}}
    )
    assert (config.train.lr, config.train.weight_decay, config.train.grad_clip) == (5e-5, 5e-4, 1.0)
    assert (config.ema.decay, config.train.precision, config.objective.boundary_probability) == (0.9999, "bf16", 0.5)
    assert config.tracking.uri is None and config.out == Path("o")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"compile": True}}, "compile is true, but .* mask_decoder has no blocks; set it to false"),
        ({"train": {"sequence_parallel": 2}}, "is 2, but .* mask_decoder has no tokens to split; set it to 1"),
        ({"lora": {}}, "lora has nothing to adapt in .* mask_decoder, which has no blocks"),
        ({"objective": {"focal_weigth": 1}}, "unknown key objective.focal_weigth; .* mask_decoder knows dice_weight, "),
        ({"objective": {"video_injection": True}}, "unknown key objective.video_injection; .* mask_decoder knows "),
        ({"objective": {"dice_weight": -1}}, "objective.dice_weight"),
    ],
)
def test_an_objective_is_asked_for_nothing_that_its_kind_has_not(changes: dict[str, Any], message: str) -> None:
    tree: dict[str, Any] = {"out": "o", "model": {"wan": "w"}, "data": {"cache": "c"}, "objective": {}, **changes}
    tree["train"] = {"steps": 1, "global_batch": 8, **tree.get("train", {})}
    tree["objective"] = {"kind": "mask_decoder", **tree["objective"]}
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(tree)


OF_ALL_KINDS = {
    "kind": "flow_matching",
    "boundary_bias": False,
    "boundary_probability": 0.5,
    "start_point_augmentation": True,
    "video_injection": True,
    "latent_noise_std": 0.0,
    "focal_weight": 3.0,
    "focal_alpha": 0.25,
    "focal_gamma": 2.0,
    "dice_weight": 4.0,
}


def test_a_saved_section_of_all_kinds_keeps_the_keys_of_its_own() -> None:
    tree = {"out": "o", "model": {"wan": "w"}, "data": {"cache": "c"}, "train": {"steps": 1, "global_batch": 8}}
    with pytest.raises(ValidationError, match=r"unknown key objective\.latent_noise_std"):
        RunConfig.model_validate(tree | {"objective": OF_ALL_KINDS})
    mine = in_todays_terms(tree | {"objective": OF_ALL_KINDS})["objective"]
    later = {"start": "video", "predicts": "velocity", "weights_seed": None}  # newer keys of this kind
    assert mine == {key: OF_ALL_KINDS[key] for key in list(OF_ALL_KINDS)[:5]} | later
    other = in_todays_terms(tree | {"objective": OF_ALL_KINDS | {"kind": "mask_decoder"}})["objective"]
    assert other == {"kind": "mask_decoder"} | {key: OF_ALL_KINDS[key] for key in list(OF_ALL_KINDS)[5:]}
