"""A command that shows a folder's content sends no control character to the terminal."""

import json
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmask.launch.cli import main as cli
from flowmask.models.process import process_here
from flowmask.trainer.track.log import RunLog

HOSTILE = [
    "\x1b[2J\x1b[1;1Hcleared",
    "\x1b]0;title\x07\x1b]8;;http://x\x1b\\link",
    "\x9b31mred\x9d0;t\x9c",
    "a\rflowmask: finished",
    "a\nflowmask: finished",
    "\u202egnp.exe\u2066",
    "\u2028line\u2029\x85",
    "[red]a[/red][link=http://x]b[/link] [/] :dog:",
    "\ud800\udcff",
    "\x00\x08\x7f",
]


def ended(out: Path, text: str) -> list[str]:
    (out / "checkpoints").mkdir(parents=True)
    gone = process_here(1).model_copy(update={"pid": 2**22, "started": 1}).model_dump()
    (out / ".owner.json").write_text(json.dumps({"owner": gone, "launcher": gone, "number": 1}))
    (out / ".ended.json").write_text(json.dumps({"number": 1, "code": 1, "message": text}))
    return ["status", str(out)]


def named_after(out: Path, text: str) -> list[str]:
    name = text.replace("/", "").replace("\x00", "").replace("\ud800", "")  # characters that no file name can have
    (out / name / "checkpoints").mkdir(parents=True)
    return ["status", str(out)]


def log(out: Path, text: str) -> list[str]:
    (out / "checkpoints").mkdir(parents=True)
    (out / "log.txt").write_text(text + "\n", errors="surrogateescape" if "\ud800" not in text else "replace")
    return ["logs", str(out)]


def owner(out: Path, text: str) -> list[str]:
    words = ended(out, text)
    (out / ".ended.json").unlink()
    elsewhere = process_here(1).model_copy(update={"boot": "x", "host": text}).model_dump()
    (out / ".owner.json").write_text(json.dumps({"owner": elsewhere, "launcher": elsewhere, "number": 1}))
    return words


def manifest(out: Path, text: str) -> list[str]:
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps({"schema_version": text, text: 1}))
    return ["cache", "verify", str(out)]


def lease(out: Path, text: str) -> list[str]:
    (out / "work" / "claims").mkdir(parents=True)
    (out / "plan").mkdir()
    (out / "plan" / "plan.json").write_text(json.dumps({"fingerprint": text}))
    return ["cache", "status", str(out)]


def tracking(out: Path, text: str) -> list[str]:
    out.mkdir()
    (out / "tracking.json").write_text(json.dumps({"key": "k", "uri": text, "experiment": text, "name": text}))
    return ["track", str(out)]


def config(out: Path, text: str) -> list[str]:
    out.mkdir()
    (out / "c.yaml").write_text(json.dumps({"train": {text: text}, text: text}))
    return ["train", str(out / "c.yaml")]


def not_there(out: Path, text: str) -> list[str]:
    return ["status", f"{out}/{text}".replace("\x00", "")]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize(
    "prepare", [ended, named_after, log, owner, manifest, lease, tracking, config, not_there], ids=lambda f: f.__name__
)
def test_no_command_passes_on_what_steers_a_terminal(
    prepare: Callable[[Path, str], list[str]], text: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["flowmask", *prepare(tmp_path / "folder", text)])
    try:
        cli.main()
    except SystemExit as stopped:
        assert stopped.code in (0, 2)
    said = capsys.readouterr()
    for stream in (said.out, said.err):
        assert {unicodedata.category(c) for c in stream if c not in "\n\t"}.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"})
    if prepare is not log:  # a log has many lines
        assert not any(line.startswith("flowmask: finished") for line in (said.out + said.err).splitlines())


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_the_log_of_a_run_has_a_line_for_a_message(text: str, tmp_path: Path, capsys: Any) -> None:
    log_file = RunLog(tmp_path / "log.txt")
    log_file.say(f"warning: {text}")
    log_file.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(time.strftime("%Y")) and lines[0].isprintable()
    shown = capsys.readouterr().err
    assert shown == lines[0] + "\n" and ("[red]a[/red]" in shown) == ("[red]" in text)
