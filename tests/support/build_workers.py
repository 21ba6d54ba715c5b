"""Workers of a cache build as separate processes, for tests that kill, stop and add workers."""

import hashlib
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from forks import Forked

from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.models.errors import CacheError

Say = Callable[[str], None]


def start(config: CacheBuildConfig, *, worker: int = 0, workers: int = 1) -> Forked:
    """Start one worker, which says a line for each progress report."""
    return Forked(_build, config.model_dump_json(), worker, workers)


def start_limited(config: CacheBuildConfig, *, limit_bytes: int) -> Forked:
    """Start a worker none of whose files may grow beyond `limit_bytes` (0: no limit); it says only its refusal."""
    return Forked(_limited, config.model_dump_json(), limit_bytes)


def start_repair(config: CacheBuildConfig) -> Forked:
    """Start a repair, which says a line at its begin and for each progress report."""
    return Forked(_repair, config.model_dump_json())


def finish(worker: Forked) -> None:
    """Wait for a worker, which must end without an error."""
    code, said = worker.finish()
    assert code == 0, said


def _build(say: Say, config: str, worker: int, workers: int) -> None:
    from flowmask.data_pipeline.build.build import build

    found = CacheBuildConfig.model_validate_json(config)
    build(found, worker=worker, workers=workers, on_progress=lambda at: say(f"{at.phase} {at.done}"))


def _limited(say: Say, config: str, limit_bytes: int) -> None:
    if limit_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        _build(lambda _: None, config, 0, 1)
    except CacheError as error:
        say(str(error))
        sys.exit(1)


def _repair(say: Say, config: str) -> None:
    from flowmask.data_pipeline.check.repair import repair
    from flowmask.data_pipeline.check.verify import verify

    found = CacheBuildConfig.model_validate_json(config)
    folder = Path(found.out)
    say("begin")
    repair(
        folder,
        found=lambda: verify(folder),
        config=lambda: found,
        on_progress=lambda what, done, total: say(f"{what} {done}"),
    )


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file, by its path in the folder; also of links, which no finished cache holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }
