"""A study's YAML: its jobs, and the one line for a mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flowmask.launch.configs import BUNDLED
from flowmask.launch.jobs import EvaluateJob, TrainJob
from flowmask.launch.reproduce import reproduce
from flowmask.launch.reproduce.study import load_study
from flowmask.models.errors import ConfigError

PAPER = BUNDLED / "paper.yaml"
PROFILES = [None, "demo"]


def study(folder: Path, **changes: Any) -> Path:
    rows = [{"name": "one", "title": "one", "config": "train.yaml"}, {"name": "two", "title": "two", "of": "one"}]
    tree = {"out": "out", "title": "t", "evaluation": {"config": "score.yaml"}, "rows": rows, **changes}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("profile", PROFILES)
def test_every_row_of_the_paper_is_a_training_and_an_evaluation_of_every_seed(
    tmp_path: Path, profile: str | None
) -> None:
    found = load_study(PAPER, [f"out={tmp_path}/out", "seeds=3"], profile=profile)
    where = {"wan": "w", "untrained_wan": "u", "dataset": "d"} if found.config.world else {}
    stages = found.curriculum(values=where).by_name
    trained = {row.name for row in found.config.rows if row.of is None}
    for row in found.config.rows:
        seeds = found.config.seeds_of.get(row.of or row.name, 3)
        assert [trial.seed for trial in found.trials() if trial.row is row] == list(range(seeds))
        for seed in range(seeds):
            scores, training = stages[f"{row.name}_seed{seed}-scores"].job, stages[f"{row.of or row.name}_seed{seed}"]
            assert isinstance(scores, EvaluateJob) and isinstance(training.job, TrainJob)
            assert scores.checkpoint == str(training.out) and training.job.train.seed == seed
            assert row.name in trained or found.seeds(row) == seeds
    assert len({stage.out for stage in stages.values()}) == len(stages)


@pytest.mark.parametrize("profile", PROFILES)
def test_trainings_of_one_seed_differ_by_nothing_but_their_row(tmp_path: Path, profile: str | None) -> None:
    """A difference between rows then comes from their objectives."""
    found = load_study(PAPER, [f"out={tmp_path}/out"], profile=profile)
    where = {"wan": "w", "untrained_wan": "u", "dataset": "d"} if found.config.world else {}
    stages = found.curriculum(values=where).by_name
    jobs = [stages[f"{row.name}_seed0"].job.model_dump(mode="json") for row in found.config.rows if row.of is None]
    for job in jobs:
        assert job["tracking"].pop("stage")  # the place of the run in MLflow
    for job in jobs:
        same = {key: value for key, value in job.items() if key not in ("objective", "out")}
        assert same == {key: value for key, value in jobs[0].items() if key not in ("objective", "out")}
    assert len({yaml.safe_dump(job["objective"]) for job in jobs}) == len(jobs)


def test_an_override_goes_over_every_training_or_evaluation_and_a_profile_over_the_file(tmp_path: Path) -> None:
    asked = [f"out={tmp_path}/out", "training.train.steps=700", "training.ema.decay=0.5", "evaluation.sampler.steps=2"]
    found = load_study(PAPER, asked, profile="demo")
    assert found.config.training.overrides["train.lr"] == 2e-3
    where = {"wan": "w", "untrained_wan": "u", "dataset": "d"}
    jobs = [stage.job for stage in found.curriculum(values=where).stages]
    assert {job.train.steps for job in jobs if isinstance(job, TrainJob) and job.makes == "dit"} == {700}
    assert {job.ema.decay for job in jobs if isinstance(job, TrainJob) and job.makes == "dit"} == {0.5}
    assert {job.sampler.steps for job in jobs if isinstance(job, EvaluateJob)} == {2, 4, 20}  # a row's own value wins


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": []}, "rows"),
        ({"rows": [{"name": "a", "title": "a"}]}, "row a needs exactly one of config"),
        ({"rows": [{"name": "a", "title": "a", "of": "b"}]}, "row a is of b; rows that are trained are:"),
        ({"rows": [{"name": "a", "title": "a", "config": "x"}] * 2}, "two rows are called a"),
        ({"rows": [{"name": "a", "title": "a", "config": "x", "against": "b"}]}, "row a is against b; rows are: a"),
        ({"rows": [{"name": "a b", "title": "a", "config": "x"}]}, "rows.0.name is 'a b'"),
        ({"seeds_of": {"three": 2}}, "seeds_of.three must be 1 or more"),
        ({"seeds_of": {"one": 0}}, "seeds_of.one must be 1 or more"),
        ({"seeds": 0}, "seeds is 0"),
        ({"evaluation": {}}, "evaluation.config is missing"),
        ({"sead": 1}, "unknown key sead; did you mean seeds?"),
    ],
)
def test_what_is_wrong_with_a_study_is_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_study(study(tmp_path, **changes))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_profile_and_a_config_that_is_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--profile is x, which is not in .*; it has demo"):
        load_study(PAPER, profile="x")
    with pytest.raises(ConfigError, match=r"--profile is demo, which is not in .*; it has none"):
        load_study(study(tmp_path), profile="demo")
    found = load_study(study(tmp_path), [f"out={tmp_path}/out"])
    with pytest.raises(ConfigError, match=r"score\.yaml does not exist|train\.yaml does not exist"):
        found.curriculum()


def test_no_password_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "run_curriculum", lambda *_, **__: 0)
    asked = [f"out={tmp_path}/out", "training.tracking.uri=postgresql://me:hunter2@host/db", "seeds=2"]
    asked += ['launch.setup=["export TOKEN=hunter2"]', "launch.sbatch_args.export=ALL,TOKEN=hunter2"]
    assert reproduce.reproduce(PAPER, asked, profile=None, wait=True, dry_run=False) == 0
    written = {path: path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert "seeds=2" in written[tmp_path / "out" / reproduce.PAGE]
    assert not [path for path, text in written.items() if "hunter2" in text]
