"""README and docs are true: links work, commands parse, keys exist, messages are those of the code."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from plugin import installed

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import names_nothing
from flowmask.launch.cli.main import app
from flowmask.launch.cli.reference import keys_of, kinds
from flowmask.launch.config import load_job
from flowmask.launch.configs import BUNDLED
from flowmask.launch.curriculum.stages import load_curriculum
from flowmask.launch.jobs import KINDS, load_any

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "data_pipeline", "trainer", "launch")
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
KIND_OF = {"train": "train", "cache build": "cache", "evaluate": "evaluate"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each `flowmask ...` line of the page's blocks, without a comment."""
    blocks = [block for kind, block in _FENCE.findall(page.read_text()) if kind in ("", "bash", "sh")]
    indented = [line.strip() for line in prose(page).splitlines() if line.startswith("    ")]
    for line in "\n".join([*blocks, *indented]).replace("\\\n", " ").splitlines():
        if line.startswith("flowmask "):
            yield shlex.split(line, comments=True)[1:]


def inline_commands(page: Path) -> Iterator[list[str]]:
    """Words of each `flowmask ...` in the prose; such a command can lack its arguments."""
    for said in re.findall(r"`flowmask ([a-z][^`]*)`", " ".join(prose(page).split())):
        yield shlex.split(said.replace("...", ""))


@cache
def root_command() -> Any:
    return typer.main.get_command(app)


def resolve(words: list[str]) -> tuple[Any, str, list[str]]:
    """The command that the words name, its name, and the other words."""
    command, names = root_command(), 0
    while hasattr(command, "commands") and len(words) > names and not words[names].startswith("-"):
        assert words[names] in command.commands, f"flowmask {' '.join(words)}: there is no such command"
        command, names = command.commands[words[names]], names + 1
    return command, " ".join(words[:names]), words[names:]


def refuse_unknown_options(words: list[str]) -> None:
    command, _, rest = resolve(words)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert given <= known | {"--help"}, f"flowmask {' '.join(words)}: unknown {sorted(given - known)}"


def refuse_unknown_keys(words: list[str]) -> None:
    """Refuse overrides that no config of the kind has; a bundled config is loaded with its overrides."""
    _, name, rest = resolve(words)
    given = [word for word in rest if re.match(r"[a-z_]+(\.[\w]+)*=", word)]
    config = next((BUNDLED.parent / word for word in rest if word.startswith("configs/")), None)
    if config is not None and config.exists() and name in (*KIND_OF, "submit", "plan", "doctor", "curriculum"):
        if name == "curriculum":
            load_curriculum(config, given)
        elif name in KIND_OF:
            load_job(config, KINDS[KIND_OF[name]], given)
        else:
            load_any(config, given)
    elif name in KIND_OF:
        known = {key.name for key in keys_of(kinds()[KIND_OF[name]])}
        unknown = [word for word in given if word.partition("=")[0] not in known]
        assert not unknown, f"flowmask {' '.join(words)}: unknown {unknown}"


@pytest.fixture(scope="module")
def own_objective(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The objective of docs/extending.md, installed."""
    source = (ROOT / "docs" / "examples" / "own_objective.py").read_text()
    entry = {"name": "huber", "group": "flowmask.objectives", "value": "own_objective:Huber"}
    with installed(tmp_path_factory.mktemp("package") / "site", source=source, **entry):
        yield


@pytest.mark.usefixtures("own_objective")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_page_parses_and_its_keys_exist(page: Path) -> None:
    for words in commands(page):
        command, name, rest = resolve(words)
        command.make_context(name, list(rest), resilient_parsing="--help" in rest)
        refuse_unknown_options(words)
        refuse_unknown_keys(words)
    for words in inline_commands(page):
        refuse_unknown_options(words)


def test_every_command_stands_on_a_page() -> None:
    said = [*(words for page in PAGES for words in (*commands(page), *inline_commands(page)))]
    named = {resolve(words)[1] for words in said}
    missing = {" ".join(path) for path, _ in leaves(root_command())} - named
    assert not missing, f"no page says how to use {sorted(missing)}"


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, by its words."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*path, name)) if hasattr(inner, "commands") else [((*path, name), inner)]


def slug(heading: str) -> str:
    """The anchor of a heading, here and on the site."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in prose(page).splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_link_of_a_page_is_dead(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{target}: there is no {place}"
        assert not anchor or anchor in anchors(place), f"{target}: no such heading"
        outside = page.is_relative_to(ROOT / "docs") and not place.is_relative_to(ROOT / "docs")
        assert not outside, f"{target} is not on the site; name it in words"


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "CHANGELOG"], ids=name_of)
def test_every_file_and_test_that_a_page_names_exists(page: Path) -> None:
    folders = (*ROOMS, "tests", "configs", "docs", "tools", "benchmarks")
    for said in re.findall(r"`([\w./:-]+)`", prose(page)):
        path, _, test = said.partition("::")
        if path.startswith(tuple(f"{folder}/" for folder in folders)) and not re.search(r"[A-Z]{4}", path):
            assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), f"{said}: there is no such file"
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), f"{said}: there is no such test"


def literals() -> str:
    """Every string in the rooms, one a line; an f-string is cut at its inserted values."""
    trees = (ast.parse(path.read_text()) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    page, said = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split()), literals()
    for bold in re.findall(r"\*\*\d+\. (.+?)\*\*", page):
        for message in re.findall(r"`([^`]+)`", bold):
            for piece in re.split(r"\b[A-Z][A-Z ]*\b|\w+\.json|\.\.\.", message):
                assert piece.strip(" ,;:()'") in said, f"{message}: nothing says {piece!r}"


def test_the_reader_on_the_page_of_checkpoints_gives_their_weights() -> None:
    from flowmask.trainer.state.checkpoint import read_full

    step = max((ROOT / "tests" / "golden" / "older" / "run" / "checkpoints").glob("step_*"))
    found: dict[str, Any] = {}
    code = next(
        block for kind, block in _FENCE.findall((ROOT / "docs" / "formats" / "runs.md").read_text()) if kind == "python"
    )
    exec(code, found)
    ours = read_full(step, kind="ema")
    assert found["tensors"](step).keys() == ours.keys()
    for name, tensor in found["tensors"](step).items():
        assert np.array_equal(tensor, ours[name].numpy()), name


def test_the_lines_that_make_a_dataset_of_a_csv_make_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = (block for kind, block in _FENCE.findall((ROOT / "docs" / "datasets.md").read_text()) if kind == "python")
    rows = ['a b.mp4,"the dog, left",masks/a b,train', 'a b.mp4,a "cat",,train', "c.mp4,the cat,masks/c,val"]
    (tmp_path / "labels.csv").write_text("\n".join(["file,sentence,mask_dir,split", *rows]))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    (video,) = open_source(DataSourceConfig(source="videos", root=tmp_path, split="train")).videos()
    assert video.video_id == "a b" and [e.text for e in video.expressions] == ["the dog, left", 'a "cat"']
    assert [names_nothing(video, e) for e in video.expressions] == [False, True]
    assert len(open_source(DataSourceConfig(source="videos", root=tmp_path, split="val")).videos()) == 1


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "formats" / "cache.html").is_file()
    assert "BeachVideo" in (tmp_path / "site" / "extending.html").read_text(), "the page holds its examples"
    messages = (tmp_path / "site" / "messages.html").read_text()
    assert "no such cache folder; make one with" in messages and "launch/config.py" in messages
