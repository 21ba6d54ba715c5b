"""One rank of a job, as launch/local/processes.py starts it: read the job, run it, report a person's mistake."""

import atexit
import ctypes
import errno
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from flowmask.launch import console
from flowmask.launch.jobs import run_rank
from flowmask.launch.local.processes import die_with_parent
from flowmask.models.errors import RankLostError, UserError
from flowmask.models.process import CRASH_EXIT_CODE, MISTAKE_EXIT_CODE

_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # a flush of an open file names no path


def main(folder: Path) -> int:
    """Run the job in `folder` as the rank that the environment names; returns the exit code."""
    die_with_parent(int(os.environ["FLOWMASK_PARENT"]))
    quieten_libraries()
    job = json.loads((folder / "job.json").read_text())
    rank = int(os.environ["RANK"])
    try:
        return run_rank(job["kind"], job["config"])
    except UserError as error:
        message: str | None = str(error)
    except OSError as error:
        message = explain_os_error(error)
        if message is None:
            (folder / f"crash_{rank:05d}.txt").write_text(traceback.format_exc())
            raise
    except RankLostError as error:
        (folder / f"lost_{int(os.environ['LOCAL_RANK']):05d}.txt").write_text(str(error))
        return CRASH_EXIT_CODE
    except BaseException:
        (folder / f"crash_{rank:05d}.txt").write_text(traceback.format_exc())
        raise
    (folder / f"error_{rank:05d}.txt").write_text(message or "")
    return MISTAKE_EXIT_CODE


def quieten_libraries() -> None:
    """On some CPUs bitsandbytes, which peft imports where it finds it, misses kernels that nothing here asks for."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def explain_os_error(error: OSError) -> str | None:
    """One line for what the file system refuses; None for an error of ours."""
    if error.filename is None:
        if error.errno not in _DISK_REFUSES:
            return None
        return f"the disk refused to write: {str(error.strerror).lower()}; make room, then start again"
    return f"{error.filename}: {str(error.strerror).lower()}; check the path, its permissions and the free space"


def run_process(work: Callable[[], int | None], *, answers: bool = False) -> NoReturn:
    """Do `work` as the whole of this process, and end it with its exit code, 1 if it raised.

    From the first line the console is best effort; `answers`: but for what it prints to stdout. At the end no library
    is torn down: a thread in the C++ of one that comes back to an interpreter that has ended, or that nobody has
    joined, aborts the process, though the work is done and saved ("terminate called without an active exception"). So
    the end is Python's own as far as its threads, `atexit` and the last lines go; the rest is the kernel's.
    """
    console.take_over()
    if answers:
        console.answer()
    try:
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # noqa: BLE001 - as Python ends with one
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads that aren't daemons
    atexit._run_exitfuncs()  # the console's last lines among them
    ctypes.CDLL(None).fflush(None)
    os._exit(code)


if __name__ == "__main__":
    run_process(lambda: main(Path(sys.argv[1])))
