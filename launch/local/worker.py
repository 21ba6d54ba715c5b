"""One rank of a job, started by launch/local/processes.py: reads the job, runs it and reports user errors."""

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
from flowmask.models.errors import RankLostError, UserError, help_of_disk
from flowmask.models.process import CRASH_EXIT_CODE, MISTAKE_EXIT_CODE

# These can come from flushing an open file, without a path.
_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def main(folder: Path) -> int:
    """Run the job in `folder` as the rank that the environment variables give; returns the exit code."""
    die_with_parent(int(os.environ["FLOWMASK_PARENT"]))
    quieten_libraries()
    job = json.loads((folder / "job.json").read_text())
    rank = int(os.environ["RANK"])
    try:
        return run_rank(job["kind"], job["config"], own_process=True)
    except UserError as error:
        message: str | None = str(error)
    except RankLostError as error:
        (folder / f"lost_{int(os.environ['LOCAL_RANK']):05d}.txt").write_text(str(error))
        return CRASH_EXIT_CODE
    except BaseException as error:
        message = explain_disk_error(error)
        if message is None:
            (folder / f"crash_{rank:05d}.txt").write_text(traceback.format_exc())
            raise
    (folder / f"error_{rank:05d}.txt").write_text(message or "")
    return MISTAKE_EXIT_CODE


def quieten_libraries() -> None:
    """Silence bitsandbytes, which peft imports: on some CPUs it warns about kernels that FlowMask does not use."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def explain_disk_error(error: BaseException) -> str | None:
    """One line for an error of the file system, also if safetensors met it; None for a bug in FlowMask."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {str(error.strerror).lower()}; check the path, its permissions and the free space"
    if isinstance(error, OSError) and error.errno in _DISK_REFUSES:
        why = str(error.strerror).lower()
    elif type(error).__name__ == "SafetensorError" and "I/O error" in str(error):
        why = " ".join(str(error).split())[:200].lower()
    else:
        return None
    return f"the disk refused to write: {why}; {help_of_disk(error)}, then start again"


def run_process(work: Callable[[], int | None], *, answers: bool = False) -> NoReturn:
    """Run `work` as this whole process, and end the process with its exit code, or 1 if it raised.

    The console is best effort from the first line on; with `answers`, stdout is not. At the end no library is torn
    down: a C++ thread that returns to an ended interpreter, or that was never joined, aborts the process although the
    work is done and saved ("terminate called without an active exception"). Only Python's own part of the end runs:
    threads, `atexit` and the last lines. The kernel does the rest.
    """
    console.take_over()
    if answers:
        console.answer()
    try:
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # noqa: BLE001 - as Python itself does
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads that aren't daemons
    atexit._run_exitfuncs()  # they print the console's last lines
    ctypes.CDLL(None).fflush(None)
    os._exit(code)


if __name__ == "__main__":
    run_process(lambda: main(Path(sys.argv[1])))
