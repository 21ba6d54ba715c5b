"""How the ranks of one machine ended: stopped on request, too slow to save, or crashed with a reason."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowmask.launch.local import processes
from flowmask.launch.local.processes import Group, JobFailedError, TooLateError
from flowmask.models.process import REQUEUE_EXIT_CODE

ROOT = Path(__file__).parents[3]
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
ABORTS_AT_EXIT = """
import atexit, ctypes, runpy, sys
from flowmask.launch import jobs
def job(kind, resolved, **_):
    libc = ctypes.CDLL(None)
    getattr(libc, "__cxa_atexit")(libc.abort, None, None)  # as a library that left a thread of C++ unjoined
    atexit.register(print, "tidied up", end="")
    libc.printf(b"said in C ")
    return eval(resolved["end"])
jobs.run_rank = job
runpy.run_module("flowmask.launch.local.worker", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("0", 0, ""), (str(REQUEUE_EXIT_CODE), REQUEUE_EXIT_CODE, ""), ("1 / 0", 1, "ZeroDivisionError: ")],
)
def test_a_rank_ends_with_its_own_code_whatever_a_library_does_when_the_process_exits(
    tmp_path: Path, end: str, code: int, said: str
) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"kind": "train", "config": {"end": end}}))
    variables = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "FLOWMASK_PARENT": str(os.getpid())}
    command = [sys.executable, "-c", ABORTS_AT_EXIT, str(tmp_path)]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr
    assert "said in C" in done.stdout and "tidied up" in done.stdout


def test_ranks_that_do_not_save_in_time_are_given_up() -> None:
    group = Group(0, 1, time_to_stop_s=lambda: 0.3)
    rank = subprocess.Popen([sys.executable, "-c", DEAF])
    try:
        with pytest.raises(TooLateError, match="previous checkpoint is unchanged"):
            processes._wait([rank], [signal.SIGTERM], group, independent=False)
    finally:
        rank.kill()
        rank.wait()


def test_a_rank_that_was_told_to_stop_before_it_listened_asks_for_a_requeue(tmp_path: Path) -> None:
    assert processes._verdict(tmp_path, [-signal.SIGTERM, -signal.SIGKILL]) == REQUEUE_EXIT_CODE
    assert processes._verdict(tmp_path, [-signal.SIGUSR2, None]) == REQUEUE_EXIT_CODE


def test_a_crash_brings_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "crash_00001.txt").write_text("Traceback ...\nKeyError: 'x'\n")
    with pytest.raises(JobFailedError, match="rank 1 ended with code 1") as caught:
        processes._verdict(tmp_path, [None, 1])
    assert "KeyError" in caught.value.traceback
