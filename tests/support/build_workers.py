"""Workers of a cache build as separate processes, for tests that kill, stop and add workers."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from flowmask.data_pipeline.config import CacheBuildConfig

ROOT = Path(__file__).parents[2]
IMPORTS_OF_A_RANK = """
import sys
from flowmask.launch.jobs import UNUSED
from flowmask.models.process import without
with without(*UNUSED):
    import diffusers.models.autoencoders.autoencoder_kl_wan
"""
_WORKER = f"""{IMPORTS_OF_A_RANK}
from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.config import CacheBuildConfig
config = CacheBuildConfig.model_validate_json(sys.argv[1])
said = lambda progress: print(progress.phase, progress.done, flush=True)
build(config, worker=int(sys.argv[2]), workers=int(sys.argv[3]), on_progress=said)
"""


def start(config: CacheBuildConfig, *, worker: int = 0, workers: int = 1) -> subprocess.Popen[str]:
    """Start one worker, which prints a line for each progress report."""
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, config.model_dump_json(), str(worker), str(workers)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a worker, which must end without an error."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def follow(process: subprocess.Popen[str], lines: int) -> str:
    """Read this many lines of a worker's progress, fewer if the worker ends; return the last line."""
    assert process.stdout is not None
    last = ""
    for _ in range(lines):
        last = process.stdout.readline().strip() or last
    return last


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file, by its path in the folder; also of links, which no finished cache holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }
