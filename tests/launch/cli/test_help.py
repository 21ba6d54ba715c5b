"""The help of `flowmask`: every command in a panel, every help text complete, and the version."""

from collections.abc import Iterator
from importlib.metadata import version

import click
import pytest
import typer
from typer import rich_utils
from typer.testing import CliRunner

from flowmask.launch.cli.main import PANELS, app
from flowmask.launch.cli.words import keep_names_whole

runner = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"})


def commands(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *path, name)


ALL = dict(commands(typer.main.get_command(app)))


def test_every_command_stands_in_one_panel() -> None:
    listed = [name for names in PANELS.values() for name in names]
    assert sorted(listed) == sorted(path[0] for path in ALL if len(path) == 1)


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_says_every_word_that_was_written_and_h_is_help(path: tuple[str, ...]) -> None:
    long, short = (runner.invoke(app, [*path, option]) for option in ("--help", "-h"))
    assert long.exit_code == 0 and long.output == short.output
    command = ALL[path]
    written = [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]
    said = "".join(long.output.split())
    missing = [word for text in written for word in text.replace("\\[", "[").split() if word not in said]
    assert missing == []


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_no_name_of_an_option_is_cut_in_a_terminal_of_80_columns(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rich_utils, "Table", rich_utils.Table)  # what the next line replaces comes back
    keep_names_whole(["--help"])
    lines = runner.invoke(app, [*path, "--help"], env={"COLUMNS": "80"}).output.splitlines()
    assert max(map(len, lines)) <= 80
    shown = set(" ".join(lines).split())
    assert shown >= {
        name
        for one in ALL[path].params
        for name in one.opts
        if name.startswith("--") and not getattr(one, "hidden", False)
    }


def test_version_names_flowmask_and_what_its_numbers_depend_on() -> None:
    said = runner.invoke(app, ["--version"])
    assert said.exit_code == 0 and said.output.startswith(f"flowmask {version('flowmask')} (Python 3.")
    assert all(f"{name} {version(name)}" in said.output for name in ("torch", "deepspeed", "diffusers"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    said = runner.invoke(app, ["--show-completion", shell], prog_name="flowmask")
    assert said.exit_code == 0 and "_FLOWMASK_COMPLETE" in said.output
