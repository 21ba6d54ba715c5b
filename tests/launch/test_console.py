"""Console output is best effort: with any stdout and stderr, the work is done with the same exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import environment
from consoles import BROKEN, broken

TALKS = """
import contextlib, os, sys, warnings
from pathlib import Path
from rich.progress import Progress
from flowmask.launch import console
from flowmask.launch.local.worker import run_process

def work():
    console.PATIENCE_S = 0.2
    file = Path(sys.argv[1]).open("w")
    with Progress(console=console.err, disable=False) as progress:
        for number in progress.track(range(1500)):
            print("a line to stdout", number)
            console.err.print("a line to stderr", number)
    for number in range(1500):
        print("the end of a name that is not UTF-8:", os.fsdecode(b"\\xff"))
    warnings.warn("a warning")
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            sys.argv[2:] or os.write(descriptor, b"from a library in C")
    file.write("done")
    file.close()
    raise SystemExit(75)

run_process(work)
"""
COUNTS = """
from flowmask.launch.local.worker import run_process
run_process(lambda: [print("line", number, "\\u2014") for number in range(20000)] and 3)
"""


@pytest.mark.parametrize("way", BROKEN)
def test_the_work_is_done_and_ends_with_its_own_code_whatever_the_console_does(way: str, tmp_path: Path) -> None:
    sleeps = ["no C"] * (way in ("sleeping reader", "stopped terminal"))  # our code can't protect a library there
    with broken(way) as console:
        command = [sys.executable, "-c", TALKS, tmp_path / "file", *sleeps]
        process = subprocess.Popen(command, env=environment(), **console)
        assert process.wait(timeout=120) == 75
    assert (tmp_path / "file").read_text() == "done", "and nothing was printed into it"


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_every_line_in_any_encoding() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTS], env=environment() | {"PYTHONIOENCODING": "ascii"}, stdout=writer, stderr=writer
    )
    os.close(writer)
    time.sleep(0.3)
    with os.fdopen(reader) as lines:
        assert lines.read().splitlines() == [f"line {number} \\u2014" for number in range(20000)]
    assert process.wait(timeout=60) == 3


@pytest.mark.parametrize("words", [["configs"], ["--help"], ["train", "--help"]], ids=" ".join)
def test_a_command_that_only_prints_ends_as_others_do_when_nobody_reads_and_names_a_full_disk(words: list[str]) -> None:
    command = [sys.executable, "-m", "flowmask", *words]
    for way, code in (("reader gone", -signal.SIGPIPE), ("full disk", 2)):
        with broken(way) as console:
            stdout = {"stdout": console["stdout"], "stderr": subprocess.PIPE}
            done = subprocess.run(command, env=environment(), text=True, timeout=120, **stdout)
        assert done.returncode == code
        said = done.stderr.splitlines()
        assert len(said) == (way == "full disk") and all(
            "stdout can't be written: no space left" in one for one in said
        )
