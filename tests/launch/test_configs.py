"""A config's name means the user's own file, else the bundled file of that name, else one line that helps."""

from pathlib import Path

import pytest

from flowmask.launch.configs import BUNDLED, bundled, copy_configs, find_config
from flowmask.models.errors import ConfigError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("train_mevis", "train_mevis.yaml"),
        ("train_mevis.yaml", "train_mevis.yaml"),
        ("configs/train_mevis.yaml", "train_mevis.yaml"),
        ("configs/demo/dit.yaml", "demo/dit.yaml"),
        ("configs/demo/dit", "demo/dit.yaml"),
    ],
)
def test_a_name_that_is_no_file_here_is_the_bundled_config_and_a_line_says_so(
    asked: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_config(Path(asked)) == BUNDLED / name
    assert capsys.readouterr().err == f"{asked} does not exist here; using the bundled configs/{name}\n"


@pytest.mark.parametrize("asked", ["train_mevis", "train_mevis.yaml", "configs/train_mevis.yaml"])
def test_a_file_of_their_own_comes_first(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(asked)
    path.parent.mkdir(exist_ok=True)
    path.write_text("out: mine\n")
    assert find_config(path) == path
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("train_mevsi", "did you mean train_mevis.yaml"),
        ("configs/demo/dti.yaml", "did you mean demo/dit.yaml"),
        ("zzz", "`flowmask configs` lists"),
        ("elsewhere/train_mevis.yaml", "did you mean train_mevis.yaml"),
        ("configs/../configs/train_mevis.yaml", "does not exist"),
        ("/configs/train_mevis.yaml", "does not exist"),
    ],
)
def test_any_other_path_is_refused_with_the_nearest_names(asked: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_config(Path(asked))
    line = str(error.value)
    assert line.startswith(f"config {asked} does not exist; ") and said in line and "\n" not in line


def test_every_listed_name_is_taken_as_it_is_listed() -> None:
    for name in bundled():
        assert find_config(name) == find_config(name.with_suffix("")) == BUNDLED / name


def test_every_bundled_config_opens_with_a_line_that_says_what_it_is() -> None:
    lines = bundled()
    assert Path("train_mevis.yaml") in lines and Path("ablation/none.yaml") in lines
    assert all(len(line) > 10 for line in lines.values())


def test_copies_are_whole_and_nothing_that_is_there_is_written_over(place: Path) -> None:
    written = copy_configs(place / "mine")
    assert {path.relative_to(place / "mine") for path in written} == set(bundled())
    assert all(path.read_bytes() == (BUNDLED / path.relative_to(place / "mine")).read_bytes() for path in written)
    other = place / "other"
    (other / "demo").mkdir(parents=True)
    (other / "demo" / "dit.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"demo/dit\.yaml already exists"):
        copy_configs(other)
    assert [path.name for path in other.rglob("*.yaml")] == ["dit.yaml"]
    assert (other / "demo" / "dit.yaml").read_text() == "mine"
