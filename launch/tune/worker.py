"""The process that runs one candidate: the launcher of a training, or a worker of a build. `trials.py` ends it."""

import json
import os
import sys
from pathlib import Path

from flowmask.launch.local.processes import JobFailedError, die_with_parent, run_local
from flowmask.launch.local.worker import explain_disk_error, quieten_libraries, run_process
from flowmask.models.errors import UserError
from flowmask.models.process import MISTAKE_EXIT_CODE

JOB, ROWS, REASON = "job.json", "rows.jsonl", "reason.txt"  # the job to run, its rows, the reason of a failure
LAUNCHER = "FLOWMASK_TRIAL_OF"  # the process that ends this one


def main(folder: Path) -> int:
    """Run the job in `folder` until this process is ended; a user error is written to REASON."""
    die_with_parent(int(os.environ[LAUNCHER]))
    quieten_libraries()
    job = json.loads((folder / JOB).read_text())
    try:
        if job["kind"] == "train":
            return run_local("train", job["config"], processes=job["config"]["launch"]["processes_per_node"])
        from flowmask.launch.tune.sample import keep_encoding

        keep_encoding(job["config"], folder / ROWS, worker=int(os.environ["LOCAL_RANK"]))
        return 0
    except JobFailedError as error:
        last = error.traceback.strip().splitlines()[-1:]
        reason: str | None = ": ".join([error.what, *last])
    except UserError as error:
        reason = str(error)
    except Exception as error:
        reason = explain_disk_error(error)
        if reason is None:
            raise
    (folder / REASON).write_text(reason or "")
    return MISTAKE_EXIT_CODE


if __name__ == "__main__":
    run_process(lambda: main(Path(sys.argv[1])))
