"""A toy is the same for the same seed, and under its overlay every bundled config runs."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import flowmask

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.sources import open_source
from flowmask.launch import dispatch
from flowmask.launch.configs import BUNDLED
from flowmask.launch.curriculum.stages import load_curriculum
from flowmask.launch.jobs import CacheJob, EvaluateJob, load_any
from flowmask.launch.jobs.job import Job
from flowmask.launch.reproduce.study import load_study
from flowmask.launch.toy import toy as toy_folder
from flowmask.launch.toy.toy import commands, write_toy
from flowmask.models.errors import ConfigError

CONFIGS = sorted(BUNDLED.rglob("*.yaml"))
CONFIGS.remove(BUNDLED / "demo.yaml")  # no job: the sizes of `flowmask demo`, which writes its own data
COMPOSED = {"rows:": "study", "stages:": "curriculum"}  # a line only of configs made of jobs; a study has both
HERE = "launch.cluster=debug"  # in the process of the command; the stages of curricula have processes of their own
COMMANDS = {
    "cache": ["cache", "build"],
    "train": ["train"],
    "evaluate": ["evaluate"],
    "curriculum": ["curriculum"],
    "study": ["reproduce"],
}


def name_of(path: Path) -> str:
    return str(path.relative_to(BUNDLED))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, except our own marks."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".flowmask"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "toy"
    write_toy(out, seed=0, say=pytest.fail)
    return out


def composed(path: Path) -> str:
    """The string `curriculum` or `study`; empty for a job."""
    lines = path.read_text().splitlines()
    return next((kind for line, kind in COMPOSED.items() if line in lines), "")


def jobs(path: Path, overlay: str) -> list[Job]:
    """Every job of a config under an overlay, in the order in which they run."""
    match composed(path):
        case "curriculum":
            return [stage.job for stage in load_curriculum(path, [overlay]).stages]
        case "study":
            study = load_study(path, [overlay])
            world = {name: str(study.out / name) for name in ("dataset", "untrained_wan", "wan")}
            return [stage.job for stage in study.curriculum(values=world if study.config.world else {}).stages]
        case _:
            return [load_any(path, [overlay])[0]]


def datasets(job: Job) -> Iterator[DataSourceConfig]:
    if isinstance(job, CacheJob):
        yield from job.sources
    if isinstance(job, EvaluateJob):
        yield from filter(None, (job.data, job.calibrate.data))


def test_all_that_a_config_reads_is_in_a_toy_or_made_under_its_overlay_by_another_config(toy: Path) -> None:
    found = {name_of(path): jobs(path, str(toy / "try.yaml")) for path in CONFIGS}
    made = {job.out.resolve() for of_one in found.values() for job in of_one}
    read = {}
    for name, of_one in found.items():
        for job in of_one:
            own_world = name == "views.yaml"  # this study writes its own data
            assert job.out.is_relative_to(toy), f"{name} writes into {job.out}"
            for each in job.inputs():
                there = each.path.exists() or not made.isdisjoint([each.path.resolve(), *each.path.resolve().parents])
                assert there or own_world, f"{name} reads {each.key} {each.path}"
            read |= {(data.source, data.root, data.split): data for data in datasets(job) if not own_world}
    for data in read.values():
        videos = list(open_source(data).videos())
        assert videos and any(video.expressions for video in videos), data
        for video in videos:
            if video.has_masks:
                video.check_masks()


def test_a_job_of_each_kind_runs_under_the_overlay(toy: Path, tmp_path: Path) -> None:
    own = tmp_path / "toy"
    shutil.copytree(toy, own)
    chain = {
        "cache_mevis.yaml": ("cache", ["cache.views=1", "clip.frames=5"]),
        "train_mevis.yaml": ("train", ["train.steps=1", "train.global_batch=4", "tracking.enabled=false"]),
        "evaluate_jhmdb.yaml": ("evaluate", [f"checkpoint={own}/runs/mevis", "mask_decoder=vae", "max_videos=1"]),
    }
    for name, (kind, smaller) in chain.items():
        assert dispatch.start(kind, BUNDLED / name, [str(own / "try.yaml"), HERE, *smaller]) == 0
    assert (own / "runs/a2d/evaluate_jhmdb/report.html").is_file()


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(toy: Path, tmp_path: Path) -> None:
    write_toy(tmp_path / "same", seed=0, say=pytest.fail)
    ours = hashes(toy)
    assert hashes(tmp_path / "same") == ours
    with pytest.raises(ConfigError, match=r"holds a toy with other settings \(seed\); name another folder"):
        write_toy(toy, seed=1, say=pytest.fail)
    assert hashes(toy) == ours


def test_every_split_that_is_scored_or_trained_on_has_sentences_that_name_nothing(toy: Path) -> None:
    for split in ("train", "valid_u", "calibrate"):
        videos = open_source(DataSourceConfig(root=toy / "data/mevis", split=split)).videos()
        assert all(any(not sentence.anno_ids for sentence in video.expressions) for video in videos)
    hidden = open_source(DataSourceConfig(root=toy / "data/mevis", split="valid")).videos()
    assert not any(video.has_masks for video in hidden)


def test_a_dataset_whose_library_is_missing_is_told_and_the_same_command_writes_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_folder, "_datasets", lambda seed: {"a2d_sentences": Path.mkdir, "revos": Path.mkdir})
    monkeypatch.setattr(toy_folder, "write_wan", lambda place, *, seed: None)
    monkeypatch.setattr(toy_folder, "write_example", lambda dataset, path: [""])
    said: list[str] = []
    with monkeypatch.context() as without:
        without.setattr(toy_folder.importlib.util, "find_spec", lambda name: None)
        write_toy(tmp_path / "toy", seed=0, say=said.append)
    assert len(said) == 1 and "pip install 'flowmask[a2d]'" in said[0]
    assert (tmp_path / "toy/data/revos").is_dir() and not (tmp_path / "toy/data/a2d_sentences").exists()
    write_toy(tmp_path / "toy", seed=0, say=pytest.fail)
    assert (tmp_path / "toy/data/a2d_sentences").is_dir()


def test_the_next_commands_name_files_that_are_there_or_come_from_those_before(toy: Path) -> None:
    said = " ".join(commands(toy, "the dog"))
    named = re.findall(r"configs/(\S+)", said)
    assert named and all((BUNDLED / name).is_file() for name in named) and (toy / "example.mp4").is_file()


@pytest.fixture(scope="module")
def caches(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with the caches of all bundled configs, which curricula would build again."""
    own = tmp_path_factory.mktemp("caches") / "toy"
    shutil.copytree(toy, own)
    for path in CONFIGS:
        if not composed(path) and isinstance(jobs(path, str(own / "try.yaml"))[0], CacheJob):
            run(*COMMANDS["cache"], path, own / "try.yaml", HERE)
    return own


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_every_job_that_comes_with_flowmask_runs_under_the_overlay(caches: Path, tmp_path: Path) -> None:
    own = tmp_path / "toy"
    shutil.copytree(caches, own)
    left = {path: jobs(path, str(own / "try.yaml"))[0] for path in CONFIGS if not composed(path)}
    while left:
        ready = [path for path, job in left.items() if all(each.path.exists() for each in job.inputs())]
        assert ready, f"nothing makes what {sorted(left)} read"
        for path in ready:
            run(*COMMANDS[left.pop(path).KIND], path, own / "try.yaml", HERE)


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("path", filter(composed, CONFIGS), ids=name_of)
def test_every_curriculum_and_study_that_comes_with_flowmask_runs_under_the_overlay(
    path: Path, caches: Path, tmp_path: Path
) -> None:
    shutil.copytree(caches, tmp_path / "toy")
    run(*COMMANDS[composed(path)], path, tmp_path / "toy" / "try.yaml")


def run(*words: object) -> None:
    done = flowmask(*words, timeout_s=3600)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
