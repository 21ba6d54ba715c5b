"""A command line with a wrong word is one line that names the word, the value and where the right ones are."""

import sys

import pytest

from flowmask.launch.cli import main as cli

PREDICT = ["predict", "a.mp4", "the dog"]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "command": (["trian"], "no such command 'trian'. Did you mean 'train', 'tiny-wan', 'track'? See `flowmask --help`"),
    "command of a group": (["cache", "bulid"], "'bulid'. Did you mean 'build'? See `flowmask cache --help`"),
    "misspelt option": (
        [*PREDICT, "--checkpont", "x"],
        "there is no option --checkpont; did you mean --checkpoint? See",
    ),
    "unlike any option": (
        [*PREDICT, "--dit_ckpt", "x"],
        "there is no option --dit_ckpt; see `flowmask predict --help`",
    ),
    "setting as an option": (["train", "train_mevis", "--lr", "1"], "no option --lr; settings of the config are given"),
    "no number": ([*PREDICT, "--checkpoint", "x", "--steps", "abc"], "--steps is 'abc': "),
    "number out of range": (["logs", ".", "-n", "0"], "--lines is '0': "),
    "none of the choices": ([*PREDICT, "--checkpoint", "x", "--device=tpu"], "--device is 'tpu': 'tpu' is not one of"),
    "option without a value": ([*PREDICT, "--checkpoint"], "option '--checkpoint' requires an argument"),
    "missing option": (PREDICT, "missing option '--checkpoint'; see `flowmask predict --help`"),
    "missing argument": (["train"], "missing argument 'config'; see `flowmask train --help`"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_word_that_is_not_understood_is_one_line(
    mistake: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, told = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["flowmask", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert said.err.startswith("flowmask: ") and said.err.count("\n") == 1 and told in said.err


@pytest.mark.parametrize("words", [[], ["cache"], ["import"]])
def test_a_group_of_commands_alone_shows_its_help(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flowmask", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code in (0, 2) and "Usage: flowmask" in said.out + said.err and "--help" in said.out + said.err
