"""One line for a file of a dataset that cannot be read, whatever its format."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowmask.models.errors import DataError


@contextmanager
def reading(
    path: Path, *, what: str, errors: tuple[type[Exception], ...] = (ValueError, RecursionError)
) -> Iterator[None]:
    """DataError if the file is missing, cannot be read, or is no valid `what`, which `errors` tell."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} is missing; see the dataset layouts in the README") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except errors as error:
        raise DataError(f"{path}: no valid {what} ({' '.join(str(error).split()) or type(error).__name__})") from error
