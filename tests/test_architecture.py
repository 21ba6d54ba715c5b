"""The laws of the source tree: allowed imports, one owner file per library, limits on the length of code."""

import ast
import configparser
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room imports itself and the rooms before it. Inside a room, a folder imports itself and the entries before it.
# "." stands for the files of the room's own folder that have no entry here.
ORDER = {
    "models": ("stored", ".", "decoders", "safe", "folders", "plugins", "weights", "cost"),
    "data_pipeline": (
        *(".", "formats", "video", "sources", "clip", "cache", "read", "claim", "plan", "build", "show", "check"),
    ),
    "trainer": ("objectives", ".", "step", "state", "track", "explain", "predict", "score", "run"),
    "launch": (
        *(".", "jobs", "local", "slurm", "plan", "check", "tune", "dispatch.py", "curriculum", "watch", "demo"),
        *("toy", "reproduce", "serve", "cli"),
    ),
}
OWNERS = {
    "deepspeed": "trainer/step/zero.py",
    "torch.distributed": "trainer/distributed.py",
    "mlflow": "trainer/track/mlflow_run.py",
    "submitit": "launch/slurm/executor.py",
    "bitsandbytes": "trainer/step/optimizer8bit.py",
    "decord": "data_pipeline/video/seeking.py",
    "av": "data_pipeline/video/",
    "obstore": "data_pipeline/cache/objects.py",
    "botocore": "data_pipeline/cache/objects.py",
    "gradio": "launch/serve/page.py",
    "uvicorn": "launch/serve/server.py",
    "pycocotools.mask": "data_pipeline/formats/rle.py",
    "pycocotools.cocoeval": "trainer/score/protocols/a2d_jhmdb.py",
}
ONLY_IN_FILES = ("os.fsync", "os.replace", "hashlib.file_digest")  # calls that only models/files.py makes
SOURCES = sorted(path.relative_to(ROOT) for room in ORDER for path in (ROOT / room).rglob("*.py"))
FOLDERS = sorted({path.parent for path in SOURCES})


def module_of(path: Path) -> str:
    """The module name of a file."""
    return "flowmask." + ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


@cache
def imported_modules(path: Path) -> frozenset[str]:
    """Every module that a file imports, also inside functions; an imported name counts if it is a module."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
            found |= {name for name in names if not node.module.startswith("flowmask")}
    return frozenset(found)


def ours(path: Path) -> Iterator[Path]:
    """The files of ours that a file imports."""
    return (MODULES[name] for name in imported_modules(path) if name in MODULES and MODULES[name] != path)


def place(path: Path) -> tuple[str, str]:
    """The room, and the folder or file of ORDER."""
    room, *inner = path.parts
    return room, inner[0] if len(inner) > 1 or inner[0] in ORDER[room] else "."


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    rooms = list(ORDER)
    room, folder = place(path)
    for other in ours(path):
        other_room, other_folder = place(other)
        assert rooms.index(other_room) <= rooms.index(room), f"{path} imports {other} of a later room"
        if other_room == room:
            order = ORDER[room]
            assert order.index(other_folder) <= order.index(folder), f"{path} imports {other}, which is later"


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({path: set(ours(path)) for path in SOURCES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(map(str, error.args[1])))


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_folder_says_its_idea_and_stays_small(folder: Path) -> None:
    files = sorted((ROOT / folder).glob("*.py"))
    assert len(files) <= 14, f"{folder} has {len(files)} files"
    said = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert said, f"{folder}/__init__.py says nothing"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 300
    too_long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 80
    ]
    assert not too_long


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path))
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert not twice


@pytest.mark.parametrize("library", OWNERS)
def test_each_heavy_library_is_imported_in_one_file_or_folder(library: str) -> None:
    importers = defaultdict(list)
    for path in SOURCES:
        for name in imported_modules(path):
            if name == library or name.startswith(f"{library}."):
                importers[str(path)].append(name)
    assert importers
    assert all(path == OWNERS[library] or f"{Path(path).parent}/" == OWNERS[library] for path in importers)


@pytest.mark.parametrize("call", ONLY_IN_FILES)
def test_files_are_synced_replaced_and_hashed_in_one_place(call: str) -> None:
    callers = {str(path) for path in SOURCES if f"{call}(" in (ROOT / path).read_text()}
    assert callers <= {"models/files.py"}


def test_the_signals_that_ask_for_an_end_stand_in_one_place() -> None:
    """With a second list of them, a signal could let one process save and end another at once."""
    assert {str(path) for path in SOURCES if "signal.SIGUSR2" in (ROOT / path).read_text()} == {"models/process.py"}


def test_the_packages_of_a_wheel_are_the_folders_of_the_tree() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = [f"flowmask.{'.'.join(folder.parts)}" for folder in FOLDERS]
    assert sorted(listed) == sorted(["flowmask", "flowmask.configs", *folders])


def test_pytest_collects_every_folder_of_tests(request: pytest.FixtureRequest) -> None:
    """By default pytest skips folders called `build` without a message."""
    skipped = request.config.getini("norecursedirs")
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert not [name for name in folders for pattern in skipped if fnmatch(name, pattern)]


def test_no_room_is_imported_under_two_names() -> None:
    """A second copy of a module has other classes and registries than the first."""
    everything = "\n".join(f"import {name}" for name in MODULES)
    code = f"import sys\n{everything}\nprint([m for m in sys.modules if m.split('.')[0] in {tuple(ORDER)}])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert printed.stdout.splitlines()[-1] == "[]"
