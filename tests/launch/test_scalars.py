"""Values that YAML and people read differently, in files and in overrides."""

from pathlib import Path

import pytest

from flowmask.launch.config import as_written, load_yaml, read_tree, split_override
from flowmask.models.errors import ConfigError

TWO_READINGS = {"010": "8", "-017": "-15", "1:30": "90", "12:30:45": "45045", "1:30.5": "90.5", "0_7": "7"}
ONE_READING = ["10", "0", "0.5", "1e-4", "0x10", "'010'", '"1:30"', "08", "a:b", "2026-11-29", "http://h:80", "1_000"]


@pytest.mark.parametrize("text", TWO_READINGS)
@pytest.mark.parametrize("place", ["a: {}\n", "b: 1\na: [1, {}]\n", "a:\n  b: {{c: {}}}\n", "? {}\n: x\n"])
def test_a_number_that_yaml_reads_as_another_is_refused_with_both(text: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(place.format(text))
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    said = str(caught.value)
    to_do = ", to the base of 60; write the number you mean" if ":" in text else f"; write {TWO_READINGS[text]} for"
    assert f"YAML reads {text} as {TWO_READINGS[text]}{to_do}" in said
    assert said.startswith(f"config {path}, line ") and "\n" not in said
    with pytest.raises(ConfigError, match=f"YAML reads {text} as"):
        split_override(f"train.seed={text}")


@pytest.mark.parametrize("text", ONE_READING)
def test_every_other_value_is_taken(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"a: {text}\n")
    assert as_written(load_yaml(path))["a"] == split_override(f"a={text}")[1]


def test_a_path_below_the_home_folder_is_there_in_files_and_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "job.yaml"
    path.write_text("out: ~/runs/a\ndata: {mix: [{cache: ~/caches/b}], name: a~/b}\nbase: ~/base.yaml\n")
    (tmp_path / "base.yaml").write_text("model: {wan: ~/wan}\n")
    assert as_written(load_yaml(path)) == {
        "model": {"wan": f"{tmp_path}/wan"},
        "out": f"{tmp_path}/runs/a",
        "data": {"mix": [{"cache": f"{tmp_path}/caches/b"}], "name": "a~/b"},
    }
    assert split_override("out=~/runs") == ("out", f"{tmp_path}/runs")


RECURSIVE = "&a [*a]"
LAUGHS = (
    "[&a [1, 1, 1, 1, 1, 1, 1, 1, 1]"
    + "".join(f", &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij"))
    + "]"
)


@pytest.mark.parametrize("text", [RECURSIVE, LAUGHS, "{", "[1, 2", "!!python/name:os.system", "1: 2: 3", "\x00"])
def test_what_is_no_value_is_one_line_in_a_file_and_in_an_override(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"a: {text}\n")
    with pytest.raises(ConfigError) as caught:
        read_tree(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^override of train\.lr: its value is not valid YAML \(") as caught:
        split_override(f"train.lr={text}")
    assert "\n" not in str(caught.value)
