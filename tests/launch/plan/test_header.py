"""The hardware and cost in the head of each config are those of its plan today."""

import importlib.util
import re
from pathlib import Path

import pytest

from flowmask.launch.configs import BUNDLED
from flowmask.launch.plan.header import LABELS, heads, lines_of

TOOL = Path(__file__).parents[3] / "tools" / "headers.py"
SHORT = ("cache_mevis", "train_mevis", "evaluate_refcoco", "one_gpu/train_mevis_24gb")
NAMES = [path.relative_to(BUNDLED).with_suffix("").as_posix() for path in heads()]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in NAMES]
)
def test_the_head_of_a_config_is_what_its_plan_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: python tools/headers.py."""
    monkeypatch.chdir(tmp_path)  # without weights and data
    path = BUNDLED / f"{name}.yaml"
    assert "\n".join(lines_of(path)) + "\n" in path.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_head_says_each_thing_once_and_a_recipe_for_a_gpu_fits_it(name: str) -> None:
    text = (BUNDLED / f"{name}.yaml").read_text()
    for label in LABELS:
        assert len(re.findall(rf"^# {label}  +\S", text, flags=re.M)) == 1
    if sized := re.search(r"_(\d+)gb$", name):
        (least,) = re.findall(r"# Hardware  1 GPU of (\d+) GB or more", text)
        assert int(least) <= int(sized[1])


def test_only_these_lines_are_written() -> None:
    spec = importlib.util.spec_from_file_location("headers", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = (BUNDLED / "train_mevis.yaml").read_text()
    found = [line for label in LABELS for line in re.findall(rf"# {label}  +.*\n(?:#  +.*\n)*", text)]
    lines = "".join(found).splitlines()
    changed = tool.written(text, ["# Hardware  x", "#           y", "# Cost      z"])
    assert changed == text.replace("".join(found), "# Hardware  x\n#           y\n# Cost      z\n") != text
    assert tool.written(changed, lines) == text
