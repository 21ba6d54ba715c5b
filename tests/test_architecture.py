"""The laws of the tree itself: who imports whom, which file owns which library, how long code may grow."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "data_pipeline", "trainer", "launch")  # a room imports only itself and those before it
OWNERS = {
    "deepspeed": "trainer/zero.py",
    "torch.distributed": "trainer/distributed.py",
    "mlflow": "trainer/mlflow_run.py",
    "submitit": "launch/slurm.py",
    "bitsandbytes": "trainer/optimizer8bit.py",
    "decord": "data_pipeline/video_file.py",
    "pycocotools": "data_pipeline/rle.py",
}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    later = ROOMS[ROOMS.index(room) + 1 :]
    for path in (ROOT / room).rglob("*.py"):
        wrong = [name for name in imported_modules(path) if name.split(".")[0] in later]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("library", OWNERS)
def test_each_heavy_library_is_imported_in_one_file(library: str) -> None:
    importers = defaultdict(list)
    for path in SOURCES:
        for name in imported_modules(path):
            if name == library or name.startswith(f"{library}."):
                importers[str(path.relative_to(ROOT))].append(name)
    assert list(importers) == [OWNERS[library]]


def test_no_import_does_work_at_the_command_line() -> None:
    """`flowmask --help` must not wait for torch: the launcher's own imports stay light."""
    import subprocess
    import sys

    heavy = ("torch", "deepspeed", "mlflow", "diffusers")
    code = f"import sys, flowmask.launch.cli.main; print([m for m in {heavy} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_stay_readable(path: Path) -> None:
    too_long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 80
    ]
    assert not too_long
