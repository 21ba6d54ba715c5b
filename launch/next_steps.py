"""The command to run after each command of `flowmask`: one line on stderr, so that stdout holds only the answer.

Words in capitals are for the user to fill in. Commands that are missing in NEXT only answer a question.
"""

import shlex
from pathlib import Path
from typing import Final

from flowmask.launch.console import err
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.models.safe.words import printable

_PREDICT = 'flowmask predict VIDEO "SENTENCE" --checkpoint {path}'
NEXT: Final = {
    "demo": _PREDICT,
    "configs": "flowmask doctor NAME",
    "doctor": "flowmask plan {path}",
    "plan": "flowmask submit {path}",
    "tune": "flowmask submit {path}",
    "tiny-wan": "flowmask cache build CONFIG model.wan={path}",
    "import wan": "flowmask doctor CONFIG model.wan={path}",
    "import flowrvs": _PREDICT,
    "cache verify": "flowmask train CONFIG data.cache={path}",
    "cache repair": "flowmask cache verify {path}",
    "cache status": "flowmask cache verify {path}",
    "submit": "flowmask status {path}",
    "curriculum": "flowmask status {path}",
    "reproduce": "flowmask status {path}",
    "predict": "flowmask serve {path}",
    "status": "flowmask logs {path}",
}
# By the result of a job (`Job.makes`), and of its export.
AFTER_JOB: Final = {
    "cache": "flowmask cache verify {path}",
    "dit": "flowmask evaluate CONFIG checkpoint={path}",
    "mask_decoder": "flowmask train CONFIG model.mask_decoder={path}",
    "video_dit": "flowmask export {path}",
    "evaluate": "flowmask compare {path} OTHER",
}
AFTER_EXPORT: Final = {**AFTER_JOB, "dit": _PREDICT, "video_dit": "flowmask doctor CONFIG model.wan={path}"}
SAME: Final = "the same command continues"
NOT_DRY: Final = "the same command without --dry-run"


def say_next(step: str, path: object = "", *overrides: str) -> None:
    """Print the next step: a command, in which `{path}` is replaced by the quoted path.

    overrides: of a config at `path`, repeated behind it
    """
    words = shlex.join([str(path), *overrides])
    err.print(printable(f"next: {step.replace('{path}', words)}"), style="dim")


def say_after(makes: str, out: Path, code: int, *, queued: bool) -> None:
    """Print the step after a job with this exit code; nothing after a failure.

    makes, out: of the `Job`; queued: it was only submitted
    """
    if code == REQUEUE_EXIT_CODE:
        say_next(SAME)
    elif code == 0:
        say_next(NEXT["submit"] if queued else AFTER_JOB[makes], out)
