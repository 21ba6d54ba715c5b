"""An overlay comes between a config and the command line, works for every kind of job, and names its mistakes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flowmask.launch.configs import BUNDLED
from flowmask.launch.curriculum.stages import load_curriculum
from flowmask.launch.jobs import KINDS, EvaluateJob, TrainJob, load_any, load_kind
from flowmask.launch.overlay import OverlayConfig
from flowmask.launch.reproduce.study import load_study
from flowmask.models.errors import ConfigError

TRAIN, EVALUATE = BUNDLED / "train_mevis.yaml", BUNDLED / "evaluate_mevis.yaml"


def write(path: Path, **keys: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def train(*arguments: str) -> TrainJob:
    return load_kind(TRAIN, TrainJob, arguments)


def test_an_overlay_is_stronger_than_the_file_the_later_of_two_than_the_first_and_the_command_line_than_both(
    tmp_path: Path,
) -> None:
    first = write(tmp_path / "first.yaml", train={"train": {"lr": 1.0, "seed": 1}, "ema.decay": 0.1})
    second = write(tmp_path / "second.yaml", train={"train.lr": 2.0})
    assert train().train.lr == 5e-5
    job = train(first, second)
    assert (job.train.lr, job.train.seed, job.ema.decay) == (2.0, 1, 0.1)
    for arguments in ([first, second, "train.lr=3"], ["train.lr=3", first, second]):
        assert train(*arguments).train.lr == 3.0


def test_a_path_of_a_config_is_where_the_longest_entry_has_it_from_the_overlays_folder_and_of_a_command_line_stays(
    tmp_path: Path,
) -> None:
    overlay = write(tmp_path / "a" / "site.yaml", paths={"runs": "r", "runs/mask_decoder": "../d", "caches": "/c"})
    job = train(overlay, "model.wan=runs/wan")
    assert job.out == tmp_path / "a/r/mevis" and job.data.cache == Path("/c/mevis_train")
    assert job.model.mask_decoder == f"{tmp_path}/a/../d" and job.model.wan == Path("runs/wan")
    assert train(write(tmp_path / "b.yaml", paths={"run": "r"})).out == Path("runs/mevis")  # not a whole part of a path


def test_each_kind_of_job_takes_its_own_section_and_every_kind_has_one(tmp_path: Path) -> None:
    assert OverlayConfig.model_fields.keys() >= KINDS.keys()
    keys = {"launch": {"processes_per_node": 1}, "train": {"train.steps": 7, "train.epochs": None}}
    overlay = write(tmp_path / "o.yaml", **keys, evaluate={"sampler.steps": 9}, cache={"cache.views": 5})
    cache, _ = load_any(BUNDLED / "cache_mevis.yaml", [overlay])
    scores, _ = load_any(EVALUATE, [overlay])
    assert cache.model_dump()["cache"]["views"] == 5 and train(overlay).train.steps == 7
    assert isinstance(scores, EvaluateJob) and scores.sampler.steps == 9


def test_a_stage_of_a_curriculum_and_of_a_study_has_what_its_config_has_under_the_overlay(tmp_path: Path) -> None:
    keys = {"train.steps": 7, "train.epochs": None, "train.decay_at_epochs": [], "train.schedule": "constant"}
    overlay = write(
        tmp_path / "o.yaml", paths={"runs": "r", "datasets": "d"}, launch={"processes_per_node": 2}, train=keys
    )
    stages = load_curriculum(BUNDLED / "curriculum_mevis_alone.yaml", [overlay, "stages.train.train.lr=1"]).by_name
    alone = train(overlay, "train.lr=1")
    told = {"stage": "train", "parent": tmp_path / "r/curriculum_mevis_alone/mlflow"}
    assert stages["train"].job.model_dump() == alone.model_dump() | {"tracking": alone.tracking.model_dump() | told}
    assert stages["submission"].out == tmp_path / "r/mevis/valid"
    assert stages["submission"].job.model_dump()["data"]["root"] == tmp_path / "d/mevis"
    rows = load_study(BUNDLED / "paper.yaml", [overlay]).curriculum().by_name
    job = rows["none_seed0"].job
    assert isinstance(job, TrainJob) and job.train == train(overlay).train and job.launch.processes_per_node == 2
    assert job.out == tmp_path / "r/paper/runs/none_seed0" and job.data.cache == Path("caches/mevis_train")


def test_a_study_takes_its_own_section_and_its_world_where_it_has_one(tmp_path: Path) -> None:
    overlay = write(tmp_path / "o.yaml", study={"seeds": 2}, world={"train_videos": 3}, train={"train.steps": 5})
    study = load_study(BUNDLED / "views.yaml", [overlay]).config
    assert study.seeds == 2 and study.world is not None and study.world.dataset["train_videos"] == 3
    assert isinstance(study.world.start, dict) and study.world.start["train"]["steps"] == 5
    assert load_study(BUNDLED / "paper.yaml", [overlay]).config.world is None
    assert load_study(BUNDLED / "views.yaml", [overlay, "seeds=4"]).config.seeds == 4


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"trian": {"train.steps": 1}}, r"unknown key trian; did you mean train\?"),
        ({"train": {"train.stepz": 1}}, "unknown key train.stepz"),
        ({"train": 3}, "train is 3"),
        ({"paths": {"runs": 3}}, "paths.runs is 3"),
        ({"out": "x", "train": {}}, "is a config, not an overlay, whose keys are paths, launch"),
    ],
)
def test_what_is_wrong_with_an_overlay_is_one_line_that_names_it(tmp_path: Path, keys: Any, said: str) -> None:
    overlay = write(tmp_path / "o.yaml", **keys)
    with pytest.raises(ConfigError, match=said) as caught:
        train(overlay)
    assert "\n" not in str(caught.value)


def test_an_overlay_that_is_not_there_or_stands_in_the_place_of_a_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"overlay nowhere\.yaml does not exist; behind a config stand KEY=VALUE"):
        train("nowhere.yaml")
    overlay = write(tmp_path / "o.yaml", paths={"runs": "r"})
    with pytest.raises(ConfigError, match=r"is an overlay config: run `flowmask COMMAND CONFIG .*o\.yaml`"):
        load_any(Path(overlay))
