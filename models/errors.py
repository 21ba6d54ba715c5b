"""User errors: the command line prints them as one line and exits with 2.

Every message names the cause, its value and the fix. Any other exception is a bug in FlowMask.
"""

import errno
import os

NO_ROOM = "free memory does not hold"  # part of the message about a GPU that is too small
_MOST_CHARACTERS = 1500
_DISK_HELP = {
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f`)",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions"),
}


class UserError(Exception):
    """An error in input, files or environment; the message gives the fix.

    The message becomes one line, also with text of a file or a library in it; a very long one is cut in the middle.
    """

    def __init__(self, message: object = "") -> None:
        line = " ".join(part.strip() for part in str(message).splitlines())
        if len(line) > _MOST_CHARACTERS:
            half = _MOST_CHARACTERS // 2
            line = f"{line[:half]} [...] {line[-half:]}"
        super().__init__(line)


def help_of_disk(error: BaseException) -> str:
    """What to do about an error of a file system that refuses to write, also one with only the system's words."""
    for number, fix in _DISK_HELP.items():
        if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
            return fix
    return "make room"


class ConfigError(UserError):
    """A config key, value or combination that cannot run."""


class DataError(UserError):
    """A dataset, video, image or mask that is missing or damaged."""


class WeightsError(UserError):
    """A weights folder or file that is missing, damaged or of another architecture."""


class CacheError(UserError):
    """A latent cache that is incomplete, damaged or made with other settings."""


class TakenOverError(CacheError):
    """Another worker took over this unit and deleted its partial file. The other result is as good."""


class CheckpointError(UserError):
    """A run folder or checkpoint that cannot be used as requested."""


class TrainingError(UserError):
    """A training that cannot continue; its run folder keeps the last good state."""


class RankLostError(Exception):
    """Another rank of the job hangs or is gone. This is no user error, so the job may be restarted."""
