"""The next command: every command with a result names one, and each of these is a command of `flowmask`."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flowmask.launch import dispatch
from flowmask.launch.check import preflight
from flowmask.launch.cli.main import app
from flowmask.launch.finding import Finding
from flowmask.launch.next_steps import AFTER_EXPORT, AFTER_JOB, NEXT, SAME, say_next
from flowmask.models.errors import ConfigError
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.trainer.predict.parts import PARTS

# Commands that answer a question, run until they are stopped, or end with a list of steps.
ANSWERS = {"config", "cache inspect", "compare", "logs", "profile", "report", "serve", "stop", "toy", "track"}
BY_JOB = {"cache build", "train", "evaluate", "export"}
CONFIG = f"data.root={Path(__file__).parent}"


def commands() -> set[str]:
    """Every command of `flowmask`, as a user types it."""
    group = typer.main.get_command(app)
    names: set[str] = set()
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        names |= {f"{name} {word}" for word in below} if below else {name}
    return names


def test_every_command_with_a_result_has_a_next_step() -> None:
    assert set(NEXT) | BY_JOB | ANSWERS == commands()
    assert set(AFTER_JOB) == {"cache", "evaluate", *PARTS} <= set(AFTER_EXPORT)


@pytest.mark.parametrize("step", sorted({*NEXT.values(), *AFTER_JOB.values(), *AFTER_EXPORT.values()}))
def test_a_next_step_is_a_command_that_exists(step: str) -> None:
    words = step.split()
    assert words[0] == "flowmask"
    assert words[1] in commands() or " ".join(words[1:3]) in commands()


def test_a_next_step_for_a_config_repeats_its_overlays_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    say_next(NEXT["plan"], "train.yaml", "out/toy/try.yaml", "train.lr=1e-4", "out=a b")
    assert capsys.readouterr().err == "next: flowmask submit train.yaml out/toy/try.yaml train.lr=1e-4 'out=a b'\n"


def test_a_path_in_a_next_step_can_be_pasted_into_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    say_next(NEXT["cache repair"], "my caches/it's\x1b[0m")
    said = capsys.readouterr().err
    assert said.startswith("next: flowmask cache verify 'my caches/it'\"'\"'s") and "\x1b" not in said


@pytest.mark.parametrize(
    ("code", "cluster", "wait", "step"),
    [
        (0, "local", True, "flowmask cache verify "),
        (0, "slurm", True, "flowmask cache verify "),
        (0, "slurm", False, "flowmask status "),
        (REQUEUE_EXIT_CODE, "local", True, SAME),
        (1, "local", True, ""),
    ],
)
def test_a_job_names_the_step_that_follows_from_its_end(
    code: int,
    cluster: str,
    wait: bool,
    step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dispatch, "run", lambda job, *, wait: code)
    keys = [CONFIG, f"out={tmp_path}", "model.wan=wan", f"launch.cluster={cluster}"]
    assert dispatch.start("cache", Path("cache_mevis"), keys, wait=wait) == code
    found = re.findall(r"^next: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert [line.startswith(step) for line in found] == [True] * bool(step)


def test_the_answer_of_a_command_stays_free_of_the_next_step() -> None:
    done = CliRunner().invoke(app, ["configs"])
    assert "next:" in done.stderr and "next:" not in done.stdout


def test_all_faults_of_a_job_are_named_at_once() -> None:
    faults = [Finding(name, "fail", f"{name} is missing") for name in ("data.root", "model.wan")]
    with pytest.raises(ConfigError, match=r"^2 problems: \(1\) data\.root is missing \(2\) model\.wan is missing$"):
        preflight.refuse([Finding("out", "pass", "fine"), *faults])
    with pytest.raises(ConfigError, match=r"^data\.root is missing$"):
        preflight.refuse(faults[:1])
