"""The help of `flowmask`: every command in a panel, every help text complete, and the version."""

from collections.abc import Iterator
from importlib.metadata import version

import click
import pytest
import typer
from typer.testing import CliRunner

from flowmask.launch.cli.main import PANELS, app

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


def test_version_names_flowmask_and_what_its_numbers_depend_on() -> None:
    said = runner.invoke(app, ["--version"])
    assert said.exit_code == 0 and said.output.startswith(f"flowmask {version('flowmask')} (Python 3.")
    assert all(f"{name} {version(name)}" in said.output for name in ("torch", "deepspeed", "diffusers"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    said = runner.invoke(app, ["--show-completion", shell], prog_name="flowmask")
    assert said.exit_code == 0 and "_FLOWMASK_COMPLETE" in said.output
