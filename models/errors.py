"""Errors that a person can act on: the command line prints them as one line and exits with 2.

Every message names the thing, its value and the fix. Anything else that is raised is a bug of ours.
"""

NO_ROOM = "free memory does not hold"  # stands in what is said of a GPU that is too small
_MOST_CHARACTERS = 1500


class UserError(Exception):
    """Something outside the program is wrong; the message says what to do.

    It is one line, whatever a file or a library had to say in it, and the middle of a very long one is left out.
    """

    def __init__(self, message: object = "") -> None:
        line = " ".join(part.strip() for part in str(message).splitlines())
        if len(line) > _MOST_CHARACTERS:
            half = _MOST_CHARACTERS // 2
            line = f"{line[:half]} [...] {line[-half:]}"
        super().__init__(line)


class ConfigError(UserError):
    """A config key, value or combination that cannot run."""


class DataError(UserError):
    """A dataset, video, image or mask that is missing or damaged."""


class WeightsError(UserError):
    """A weights folder or file that is missing, damaged or of another architecture."""


class CacheError(UserError):
    """A latent cache that is incomplete, damaged or made with other settings."""


class TakenOverError(CacheError):
    """Another worker took over our unit and deleted our partial file. Its result is as good as ours."""


class CheckpointError(UserError):
    """A run folder or checkpoint that cannot be used as asked."""


class TrainingError(UserError):
    """A training that cannot go on; its run folder keeps the last good state."""


class RankLostError(Exception):
    """Another rank of the job hangs or is gone: no one's mistake, so it may be started again."""
