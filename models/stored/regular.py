"""Opens only regular files: a pipe or a device is refused at once, and also a link out of the folder.

Errors are OSErrors whose `strerror` names the fault of the file.
"""

import errno
import os
import stat
from pathlib import Path

SMALL = 1 << 24  # bytes; FlowMask's JSON files except manifests and tables are far smaller


def open_regular(path: Path, *, inside: Path | None = None) -> int:
    """A descriptor to read a regular file. inside: the folder that links in the path must not leave."""
    if inside is not None:
        refuse_outside(path, inside)
    _refuse_other_kinds(path, path.stat().st_mode)  # opening a device may have an effect
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would wait
    try:
        _refuse_other_kinds(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_other_kinds(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file", str(path))


def refuse_outside(path: Path, folder: Path) -> None:
    """OSError if links lead from `path` in `folder` to a place outside of it."""
    target, home = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath((target, home)) != home:
        raise OSError(errno.ELOOP, f"it leads to {target}, outside of {folder}; put the file itself there", str(path))


def read_regular(path: Path, *, limit: int = SMALL, inside: Path | None = None) -> bytes:
    """The content of a regular file; OSError if it has more than `limit` bytes."""
    with os.fdopen(open_regular(path, inside=inside), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return content
