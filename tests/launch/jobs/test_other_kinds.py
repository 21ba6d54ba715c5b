"""A config given to another kind's command is refused with its kind and the right command."""

from pathlib import Path

import pytest

from flowmask.launch.config import as_written, load_yaml
from flowmask.launch.configs import bundled, find_config
from flowmask.launch.jobs import KINDS, load_any, load_kind, refuse_other_kind
from flowmask.models.errors import ConfigError

COMMANDS = {"study": "reproduce", "curriculum": "curriculum"} | {name: kind.COMMAND for name, kind in KINDS.items()}
PREFIXES = {"paper": "study", "views": "study", "curriculum_": "curriculum"}


def kind_of(name: str, path: Path) -> str:
    """The kind of a bundled config; by its name if it consists of several jobs."""
    composed = next((kind for prefix, kind in PREFIXES.items() if name.startswith(prefix)), None)
    return composed or load_any(path, ["checkpoint=x"] if "evaluate" in name else [])[0].KIND


@pytest.mark.parametrize("name", [str(name) for name in bundled() if name != Path("demo.yaml")])
def test_a_bundled_config_is_taken_by_its_own_command_and_named_by_every_other(name: str) -> None:
    path = find_config(Path(name))
    keys, own = as_written(load_yaml(path)), kind_of(Path(name).name, path)
    if own == "evaluate":
        keys["checkpoint"] = "x"
    refuse_other_kind(keys, own, path=path)
    for other in COMMANDS.keys() - {own}:
        with pytest.raises(ConfigError, match=f"is an? {own} config: run `flowmask {COMMANDS[own]} "):
            refuse_other_kind(keys, other, path=path)


def test_a_config_with_a_key_of_no_kind_is_told_of_the_key(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("out: x\nmodel: {wan: x}\ndata: {source: mevis, root: x, split: train}\nclipp: {}\n")
    with pytest.raises(ConfigError, match="unknown key clipp"):
        load_kind(path, KINDS["evaluate"])


def test_every_problem_of_a_config_is_in_its_one_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("kind: train\nout: x\nmodel: {wan: x}\ndata: {cache: x, cachee: y}\ntrain: {steps: 0, lr: -1}\n")
    with pytest.raises(ConfigError) as caught:
        load_kind(path, KINDS["train"])
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in ("data.cachee", "train.steps is 0", "train.lr is -1"))
    assert f"{path}: " in said and "(1) " in said


def test_a_kind_that_is_written_down_is_accepted_by_its_own_command(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"base: {find_config(Path('train_mevis')).resolve()}\nkind: train\n")
    assert load_kind(path, KINDS["train"]).KIND == load_any(path)[0].KIND == "train"
