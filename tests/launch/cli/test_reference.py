"""The config reference: every key has a description, and pages, schemas and terminal agree with the sections."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from flowmask.launch.cli.main import app
from flowmask.launch.cli.reference import keys_of, kinds, schema
from flowmask.launch.configs import BUNDLED, bundled
from tools.config_reference import files

KINDS = kinds()


@pytest.mark.parametrize("name", KINDS)
def test_every_key_says_what_it_is_and_is_a_key(name: str) -> None:
    keys = list(keys_of(KINDS[name]))
    assert not [key.name for key in keys if not key.meaning or not key.type]
    assert len({(key.section, key.name) for key in keys}) == len(keys)


def test_the_pages_are_what_the_sections_say_now() -> None:
    """If this fails: python tools/config_reference.py."""
    for path, text in files().items():
        assert path.read_text() == text, path
    assert {path.name for path in next(iter(files())).parent.iterdir()} == {path.name for path in files()}


def at(tree: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree[part]
    return tree


def test_a_key_is_told_with_its_default_and_whether_a_resume_may_change_it() -> None:
    keys = {key.name: key for key in keys_of(KINDS["train"])}
    assert (keys["train.lr"].default, keys["train.lr"].type, keys["train.lr"].may_change) == (
        "5e-05",
        "number > 0",
        False,
    )
    assert keys["train.micro_batch"].may_change and keys["guard.loss_spike"].may_change
    assert keys["model.wan"].default == "" and keys["model.wan"].type == "path"
    assert keys["evaluate.whole_videos.data.root"].may_change
    assert (keys["lora"].default, keys["lora"].type) == ("null", "section | null"), "a section that may be left out"
    assert keys["objective.focal_alpha"].section.startswith("objective, kind: ")


def test_the_schema_takes_every_bundled_config_of_its_kind_and_refuses_what_the_command_refuses() -> None:
    train = Draft202012Validator(json.loads(schema("train", KINDS["train"])))
    seen = 0
    for name in bundled():
        tree = yaml.safe_load((BUNDLED / name).read_text())
        if name.name.startswith("train_") and "base" not in tree:
            assert not list(train.iter_errors(tree)), name
            seen += 1
            wrong = {**tree, "train": {**tree["train"], "lr": "fast"}}
            unknown = {**tree, "train": {**tree["train"], "learning_rate": 1}}
            other = {**tree, "objective": {"kind": "mask_decoder", "boundary_bias": True}}
            assert all(list(train.iter_errors(one)) for one in (wrong, unknown, other)), name
    assert seen >= 3


def test_the_command_prints_keys_and_schema_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    run = CliRunner()
    told = run.invoke(app, ["config", "train", "guard"])
    assert told.exit_code == 0 and "guard.loss_spike" in told.stdout and "train.lr" not in told.stdout
    assert json.loads(run.invoke(app, ["config", "cache", "--schema"]).stdout)["title"] == "flowmask cache"
    for words, said in (
        (["config", "gan"], "known: train"),
        (["config", "train", "xyz"], "no key of train contains 'xyz'"),
    ):
        refused = run.invoke(app, words)
        assert refused.exit_code and said in str(refused.exception)
