"""A wheel, made from an sdist, works beside other people's packages and files with the names of our rooms."""

import os
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from runs import make_lab, run_config

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "data_pipeline", "trainer", "launch")
PACKAGES = (*ROOMS, "configs")
SOURCES = ("flowmask", *PACKAGES, "container", *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"))
SOURCES += ("constraints.txt", "MANIFEST.in", "setup.cfg", "pyproject.toml")
POISON = "raise SystemExit(f'{__file__} was imported')\n"
RIVAL = "[project]\nname = 'rival'\nversion = '1'\n[tool.setuptools]\npackages = {}\n"


def build_sdist(source: Path, out: Path) -> Path:
    """The sdist of a source tree, built without a network."""
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, check=True, stdout=subprocess.DEVNULL)
    return next(out.glob("*.tar.gz"))


def contents(wheel: Path) -> dict[str, bytes]:
    """Every file of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def build_wheel(source: Path, wheels: Path) -> Path:
    """The wheel of a source tree or an sdist, built without a network."""
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-w", str(wheels)]
    subprocess.run([sys.executable, "-m", "pip", *words, str(source)], check=True)
    return max(wheels.glob("*.whl"), key=lambda path: path.stat().st_mtime_ns)


def write_theirs(folder: Path) -> None:
    """Write packages and modules with our rooms' names, and one with a library's name; none of them may be imported."""
    for name in PACKAGES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(POISON)
    for name in ("trainer.py", "launch.py", "yaml.py"):
        (folder / name).write_text(POISON)


class Installation:
    """A virtual environment with the wheel of our sdist, and a rival's wheel whose packages have our rooms' names."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "venv" / "bin"
        venv.create(folder / "venv", symlinks=True)
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        source = folder / "source"
        source.mkdir()
        for path in (ROOT / name for name in SOURCES):
            if path.is_dir():
                shutil.copytree(path, source / path.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(path, source / path.name)
        write_theirs(folder / "rival")
        (folder / "rival" / "pyproject.toml").write_text(RIVAL.format(list(PACKAGES)))
        self.of_sdist = build_wheel(build_sdist(source, folder), folder / "of_sdist")
        self.of_tree = build_wheel(source, folder / "of_tree")
        wheels = self.of_sdist, build_wheel(folder / "rival", folder)
        self.pip("install", "--no-deps", "--ignore-installed", "--disable-pip-version-check", *wheels)

    def pip(self, *words: object) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "--quiet", *map(str, words)]
        subprocess.run(command, check=True)

    def run(self, *words: object, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment, with `path` on PYTHONPATH."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {"PYTHONPATH": str(path), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        command = [str(self.bin / str(words[0])), *map(str, words[1:])]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("installed"))


def test_an_sdist_makes_the_wheel_that_the_tree_makes_and_it_holds_every_file_of_the_packages(
    installation: Installation,
) -> None:
    held = contents(installation.of_sdist)
    assert held == contents(installation.of_tree)
    files = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts)
    wanted = {f"flowmask/{path.relative_to(ROOT)}" for path in files if path.is_file()}
    wanted |= {f"flowmask/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    assert {name for name in held if name.startswith("flowmask/")} == wanted


def test_a_wheel_works_beside_other_packages_and_files_of_its_rooms_names(
    installation: Installation, tmp_path: Path
) -> None:
    here, path = tmp_path / "here", tmp_path / "path"
    write_theirs(here)
    for name in PACKAGES:
        shutil.copytree(here / name, path / name)
    make_lab(tmp_path)
    tracked = {"tracking.enabled": True, "tracking.end_timeout_s": 300.0}  # MLflow's import is slow on a busy machine
    config = run_config(tmp_path, tmp_path / "run", {"train.steps": 2, **tracked})
    (here / "mine.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = installation.run("flowmask", "train", "mine.yaml", cwd=here, path=path)
    assert done.returncode == 0, done.stdout + done.stderr
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        (status,) = database.execute("SELECT status FROM runs").fetchone()
    assert status == "FINISHED"  # MLflow's sender process ran too
    wrote = installation.run("flowmask", "tiny-wan", "wan", cwd=here, path=path)
    assert wrote.returncode == 0 and (here / "wan" / "vae").is_dir(), (
        wrote.stderr
    )  # finds the files that ship with the package
    listed = installation.run("python", "-m", "flowmask", "configs", cwd=here, path=path)
    assert "train_mevis.yaml" in listed.stdout, listed.stderr
    versions = installation.run("flowmask", "--version", cwd=here, path=path)
    assert versions.stdout.startswith("flowmask 0."), versions.stderr
    installation.pip("uninstall", "--yes", "rival")
    listed = installation.run("flowmask", "configs", cwd=here, path=path)
    assert "train_mevis.yaml" in listed.stdout, listed.stderr


@pytest.mark.long
def test_a_wheel_plans_a_bundled_config_by_its_name(installation: Installation, tmp_path: Path) -> None:
    planned = installation.run("flowmask", "plan", "train_mevis", cwd=tmp_path, path=tmp_path)
    assert planned.returncode == 0 and "80 GB GPU: train.zero_stage=" in planned.stdout, planned.stderr
