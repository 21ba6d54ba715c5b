"""The answer to an unknown key is the intended key: by its name, another trainer's name for it, or its letters."""

import pytest

from flowmask.launch.jobs import KINDS
from flowmask.launch.nearest import MEANS, _keys, nearest


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_by_another_trainers_name_is_told_and_exists(kind: str) -> None:
    leaves = {key for key, leaf in _keys(KINDS[kind]) if leaf}
    for theirs, ours in MEANS.items():
        if any(f".{key}".endswith(f".{ours}") for key in leaves) and not any(
            f".{key}".endswith(f".{theirs}") for key in leaves
        ):
            told = nearest(KINDS[kind], ["train", theirs]).removeprefix("; did you mean ").removesuffix("?")
            assert told in leaves and f".{told}".endswith(f".{ours}"), theirs


def test_every_meaning_is_a_key_of_some_kind() -> None:
    leaves = {f".{key}" for kind in KINDS.values() for key, leaf in _keys(kind) if leaf}
    assert [ours for ours in MEANS.values() if not any(key.endswith(f".{ours}") for key in leaves)] == []


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        ("train", "train.learning_rate", "train.lr"),
        ("train", "train.stepz", "train.steps"),
        ("train", "lr", "train.lr"),
        ("train", "train.every_steps", "checkpoint.every_steps"),
        ("train", "data.num_workers", "data.threads"),
        ("train", "output_dir", "out"),
        ("train", "launch.gpus", "launch.processes_per_node"),
        ("cache", "cache.veiws", "cache.views"),
        ("cache", "data.data_dir", "data.root"),
        ("evaluate", "num_inference_steps", "sampler.steps"),
    ],
)
def test_the_key_that_was_meant_is_named(kind: str, wrong: str, right: str) -> None:
    assert nearest(KINDS[kind], wrong.split(".")) == f"; did you mean {right}?"


def test_a_name_like_none_lists_those_of_its_section() -> None:
    assert nearest(KINDS["train"], ["ema", "qqq"]) == "; ema knows decay"
