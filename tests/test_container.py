"""The container recipes agree, and their one script sets FlowMask up in a bare Debian."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT, SUITE, SOURCE = "container/setup.sh", "bookworm", "/opt/source"
DOCKERFILE, DEFINITION = (ROOT / "container" / name for name in ("Dockerfile", "flowmask.def"))
NEEDED = ("debootstrap", "unshare", "chroot")


def docker_files() -> dict[str, str]:
    """The COPY lines of the Dockerfile: name in the checkout -> place in the image."""
    found = {}
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE.read_text(), re.MULTILINE):
        *names, place = line.split()
        found |= {name: f"{place}{name}" if place.endswith("/") else place for name in names}
    return found


def apptainer_files() -> dict[str, str]:
    """The same for the Apptainer definition."""
    block = re.search(r"^%files\n((?: +.+\n)+)", DEFINITION.read_text(), re.MULTILINE)
    assert block is not None
    return dict(line.split() for line in block[1].splitlines())


def wanted_files() -> set[str]:
    """Top-level names that the set-up reads: those in setup.cfg, and the files for pip and the script."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = [line.partition("=")[2].strip() for line in setup["options"]["package_dir"].strip().splitlines()]
    texts = [setup["metadata"]["long_description"].removeprefix("file: "), setup["metadata"]["license_files"]]
    return {*folders, *texts, "setup.cfg", "pyproject.toml", "constraints.txt", "container"}


def test_both_recipes_copy_all_that_the_set_up_reads_to_the_same_places() -> None:
    assert docker_files() == apptainer_files() == {name: f"{SOURCE}/{name}" for name in wanted_files()}


def test_both_recipes_begin_with_the_same_debian_and_run_the_one_script_alone() -> None:
    docker, definition = DOCKERFILE.read_text(), DEFINITION.read_text()
    base = re.findall(r"^FROM (\S+)$", docker, re.MULTILINE)
    assert base == re.findall(r"^From: (\S+)$", definition, re.MULTILINE) == [f"debian:{SUITE}-slim"]
    assert re.findall(r"^RUN (.+)$", docker, re.MULTILINE) == [f"{SOURCE}/{SCRIPT}"]
    post = re.search(r"^%post\n((?: +.+\n)+)", definition, re.MULTILINE)
    assert post is not None and post[1].split() == [f"{SOURCE}/{SCRIPT}"]
    assert os.access(ROOT / SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / SCRIPT)], check=True)


def pip_settings(root: Path, folders: set[Path]) -> dict[str, str]:
    """This machine's pip settings as variables; their files are copied into `root`, their folders are added."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = {}
    for key, value in re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE):
        words = []
        for word in value.split():
            is_index = word.startswith("file:")  # the index pages link to files beside them
            path = Path(urllib.parse.urlparse(word).path).parent if is_index else Path(word)
            if path.is_absolute() and path.is_file():
                (root / "settings").mkdir(exist_ok=True)
                word = f"/settings/{path.name}"
                shutil.copyfile(path, root / word[1:])
            elif path.is_absolute() and path.is_dir():
                folders.add(path)
            words.append(word)
        found[f"PIP_{key.upper().replace('-', '_')}"] = " ".join(words)
    return found


@pytest.fixture
def bare_debian(tmp_path: Path) -> Iterator[Path]:
    """A Debian with its essential packages and apt alone, and this machine's network settings."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(NEEDED)}: as root, apt-get install debootstrap util-linux")
    root = tmp_path / "root"
    words = ["debootstrap", "--variant=minbase", SUITE, str(root)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=1200)
    shutil.copyfile("/etc/resolv.conf", root / "etc" / "resolv.conf")
    settings = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    ways = re.findall(r'^Acquire::(?:https?::Proxy|Check-).* "[^"]+";$', settings, re.MULTILINE)
    (root / "etc" / "apt" / "apt.conf.d" / "99test").write_text("".join(f"{way}\n" for way in ways))
    (root / "etc" / "dpkg" / "dpkg.cfg.d" / "99test").write_text("force-unsafe-io\n")
    yield root
    shutil.rmtree(root)


@pytest.mark.long
def test_the_script_sets_flowmask_up_in_a_bare_debian(bare_debian: Path) -> None:
    source = bare_debian / SOURCE[1:]
    source.mkdir(parents=True)
    for name in docker_files():
        subprocess.run(["cp", "-a", str(ROOT / name), str(source)], check=True)
    folders = {Path("/dev")}
    environment = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
    environment |= pip_settings(bare_debian, folders)
    for folder in folders:
        (bare_debian / str(folder)[1:]).mkdir(parents=True, exist_ok=True)
    mounts = [f"mount --rbind {folder} {bare_debian}{folder}" for folder in folders]
    mounts.append(f"mount -t proc proc {bare_debian}/proc")
    commands = f"{SOURCE}/{SCRIPT} && cd /tmp && flowmask configs && flowmask tiny-wan wan"
    script = " && ".join([*mounts, f"exec chroot {bare_debian} bash -c '{commands}'"])
    alone = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "bash", "-c", script]
    done = subprocess.run(alone, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "train_mevis.yaml" in done.stdout
    assert (bare_debian / "tmp" / "wan" / "vae").is_dir()
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert f"deepspeed {pinned['deepspeed']}" in done.stdout
