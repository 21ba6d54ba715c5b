"""A study's YAML: the rows of a table, each a training and an evaluation for every seed, as stages of one curriculum.

OUT/runs/ROW_seed0   the training of a row     OUT/evaluate/ROW_seed0   its scores
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf
from pydantic import Field, model_validator

from flowmask.launch.config import load_yaml, readable, set_key, split_override, validate
from flowmask.launch.configs import find_config
from flowmask.launch.curriculum.laid_over import laid_over, override, with_config, with_configs
from flowmask.launch.curriculum.stages import Curriculum, StageConfig, curriculum_of
from flowmask.launch.jobs import EvaluateJob, TrainJob, refuse_other_kind
from flowmask.launch.overlay import Overlay, split
from flowmask.models.config import Section
from flowmask.models.errors import ConfigError

_NAME = r"^[A-Za-z0-9_-]+$"


class EveryConfig(Section):
    """Settings that override the config of every training, or every evaluation, of a study."""

    config: str | dict[str, Any] | None = Field(
        None, description="for evaluations: a YAML, relative to the study's folder, or its keys"
    )
    needs: tuple[str, ...] = Field((), description="stages that must be done before")
    overrides: dict[str, Any] = Field({}, description="KEY: VALUE to override its config; keys are dotted")
    carries: dict[str, str] = Field({}, description="KEY: ${stages.NAME.KEY}, from a stage in needs")


class RowConfig(Section):
    """A row of the table."""

    name: str = Field(pattern=_NAME, description="name in folders and in other rows")
    title: str = Field(description="what the table calls it")
    published: float | None = Field(None, description="J&F as it was published")
    config: str | dict[str, Any] | None = Field(
        None, description="YAML of a training, relative to the study's folder, or its keys"
    )
    of: str | None = Field(
        None, description="in place of config: the row whose weights are evaluated with other settings"
    )
    needs: tuple[str, ...] = Field((), description="further stages that this row's training needs")
    carries: dict[str, str] = Field({}, description="overrides those of every training")
    training: dict[str, Any] = Field({}, description="KEY: VALUE to override this row's training")
    evaluation: dict[str, Any] = Field({}, description="KEY: VALUE to override this row's evaluation")
    seeded: tuple[str, ...] = Field((), description="further keys that are set to the seed, like train.seed")
    against: str | None = Field(None, description="the row to compare with")

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if (self.config is None) == (self.of is None):
            raise ValueError(f"row {self.name} needs exactly one of config (to train it) and of (a trained row)")
        return self


class WorldConfig(Section):
    """Synthetic data for the study: a dataset, a tiny Wan, and a DiT trained on its videos."""

    dataset: dict[str, Any] = Field(description="sizes, as in configs/demo.yaml")
    cache: str = Field(description="the stage that caches its training split")
    start: str | dict[str, Any] = Field(
        description="a text-to-video training: its YAML, relative to the study's folder, or its keys; "
        "every row starts from its DiT"
    )


class StudyConfig(Section):
    """`flowmask reproduce`."""

    out: Path = Field(description="a new folder, or the one of this study, which then continues")
    title: str = Field(description="of the page")
    seeds: int = Field(1, ge=1, description="trainings of each row")
    seeds_of: dict[str, int] = Field({}, description="row -> number of seeds, if not `seeds`")
    values: dict[str, Any] = Field({}, description="values for ${values.NAME} anywhere below")
    launch: dict[str, Any] = Field({}, description="overrides the `launch` section of every job")
    world: WorldConfig | None = None
    stages: tuple[StageConfig, ...] = Field((), description="stages of a curriculum that all rows share")
    training: EveryConfig = EveryConfig()
    evaluation: EveryConfig = EveryConfig()
    rows: tuple[RowConfig, ...] = Field(min_length=1, description="rows of the table, from top to bottom")

    @model_validator(mode="after")
    def _rows_know_each_other(self) -> Self:
        trained = {row.name: row for row in self.rows if row.of is None}
        names = [row.name for row in self.rows]
        for row in self.rows:
            if names.count(row.name) > 1:
                raise ValueError(f"two rows are called {row.name}; rename one")
            if row.of is not None and row.of not in trained:
                raise ValueError(f"row {row.name} is of {row.of}; rows that are trained are: {', '.join(trained)}")
            if row.against is not None and row.against not in names:
                raise ValueError(f"row {row.name} is against {row.against}; rows are: {', '.join(names)}")
        if unknown := [name for name in self.seeds_of if name not in trained or self.seeds_of[name] < 1]:
            raise ValueError(f"seeds_of.{unknown[0]} must be 1 or more, of a row that is trained: {', '.join(trained)}")
        return self


@dataclass(frozen=True)
class Trial:
    """A row at one seed, with the folders of its weights and scores."""

    row: RowConfig
    seed: int
    run: Path
    evaluation: Path

    @property
    def stage(self) -> str:
        """Name of the evaluation's stage. The training's stage is named after its run."""
        return f"{self.evaluation.name}-scores"


@dataclass(frozen=True)
class Study:
    """A parsed study. path: its YAML; the configs in it are relative to its folder."""

    path: Path
    config: StudyConfig

    @property
    def out(self) -> Path:
        return self.config.out

    def seeds(self, row: RowConfig) -> int:
        """Number of seeds with which a row is trained and scored."""
        return self.config.seeds_of.get(row.of or row.name, self.config.seeds)

    def trials(self) -> Iterator[Trial]:
        """All trials, seed by seed, so that an unfinished study has scores of each row."""
        for seed in range(max(map(self.seeds, self.config.rows))):
            for row in self.config.rows:
                if seed < self.seeds(row):
                    run = self.out / "runs" / f"{row.of or row.name}_seed{seed}"
                    yield Trial(row, seed, run, self.out / "evaluate" / f"{row.name}_seed{seed}")

    def found(self, config: str | dict[str, Any]) -> str | dict[str, Any]:
        """The path of the YAML named in the study, or the keys in its place."""
        return config if isinstance(config, dict) else str(find_config(self.path.parent / config).resolve())

    def curriculum(self, *, values: Mapping[str, Any] | None = None, stages: Sequence[Any] | None = None) -> Curriculum:
        """The stages: the shared ones, then each trial's. stages: replace those of the trials."""
        config = self.config
        shared = [{**one.model_dump(mode="json"), "config": self.found(one.config)} for one in config.stages]
        made = [*shared, *(self._trials() if stages is None else stages)]
        tree = {
            "out": str(self.out / "curriculum"),
            "values": {**config.values, **(values or {}), "out": str(self.out)},
            "launch": config.launch,
            "stages": [{key: value for key, value in stage.items() if value not in (None, {}, [])} for stage in made],
        }
        return curriculum_of(OmegaConf.create(tree), self.path, title=self.config.title, group=self.out / "mlflow")

    def _trials(self) -> Iterator[dict[str, Any]]:
        config = self.config
        assert config.evaluation.config is not None
        for trial in self.trials():
            row, seed = trial.row, trial.seed
            if row.config is not None:
                seeds = dict.fromkeys(("train.seed", *row.seeded), seed)
                yield {
                    "name": trial.run.name,
                    "kind": TrainJob.KIND,
                    "config": self.found(row.config),
                    "needs": [*config.training.needs, *row.needs],
                    "overrides": {**config.training.overrides, **row.training, **seeds, "out": str(trial.run)},
                    "carries": {**config.training.carries, **row.carries},
                }
            others = {key: value for key, value in config.evaluation.carries.items() if key not in row.evaluation}
            yield {
                "name": trial.stage,
                "kind": EvaluateJob.KIND,
                "config": self.found(config.evaluation.config),
                "needs": [trial.run.name, *config.evaluation.needs],
                "overrides": {**config.evaluation.overrides, **row.evaluation, "out": str(trial.evaluation)},
                "carries": {"checkpoint": f"${{stages.{trial.run.name}.out}}", **others},
            }


def load_study(path: Path, overrides: Sequence[str] = (), *, profile: str | None = None) -> Study:
    """Read a study; raises ConfigError with one line for any fault.

    profile: the keys below `profiles.NAME` replace those of the file. overrides: overlays; `KEY=VALUE` of the study;
    `training.KEY=VALUE` and `evaluation.KEY=VALUE` override every training and evaluation.
    """
    path = find_config(path)
    with readable(path):
        tree: Any = OmegaConf.to_container(load_yaml(path))
        refuse_other_kind(tree, "study", path=path)
        overlays, overrides = split(overrides)
        profiles = tree.pop("profiles", None) or {}
        if profile is not None:
            if profile not in profiles:
                known = f"it has {', '.join(profiles)}" if profiles else "it has none"
                raise ConfigError(f"--profile is {profile}, which is not in {path}; {known}")
            tree |= profiles[profile]
        for overlay in overlays:
            tree = _under(overlay, tree, path)
        given = [(item, *split_override(item)) for item in overrides]
        for _, key, value in given:
            if (inner := _of_every(key)) is not None:
                every = tree.setdefault(inner[0], {})
                every["overrides"] = {**every.get("overrides", {}), inner[1]: value}
        loaded = OmegaConf.create(tree)
        for item, key, value in given:
            if _of_every(key) is None:
                set_key(loaded, key, value, where=f"override {item!r}")
        plain: Any = OmegaConf.to_container(loaded)
    study = Study(path, validate(plain, StudyConfig, origin=str(path)))
    if study.config.evaluation.config is None:
        raise ConfigError(f"{path}: evaluation.config is missing; name the YAML of the evaluation")
    return study


def _under(overlay: Overlay, tree: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys of a study with an overlay over each of its jobs, and over the study itself."""
    named = {**tree, "rows": with_configs(tree.get("rows"), path), "stages": tree.get("stages") or []}
    for name, key in (("evaluation", "config"), ("world", "start")):
        named[name] = with_config(named.get(name), path, key=key)
    found = laid_over(named, overlay, path)
    for name, kind in (("training", TrainJob.KIND), ("evaluation", EvaluateJob.KIND)):
        found[name] = found.get(name) or {}
        override(found[name], overlay, kind)
    keys = overlay.keys("study")
    if found["world"] is not None:
        for prefix, section in (("world.dataset", "world"), ("world.start", TrainJob.KIND)):
            keys |= {f"{prefix}.{key}": value for key, value in overlay.keys(section).items()}
    loaded = OmegaConf.create(found)
    for key, value in keys.items():
        set_key(loaded, key, value, where=str(overlay.path))
    plain: Any = OmegaConf.to_container(loaded)
    return dict(plain)


def _of_every(key: str) -> tuple[str, str] | None:
    """Split `training.KEY` or `evaluation.KEY` into the two parts; None for another key."""
    first, _, rest = key.partition(".")
    return (first, rest) if first in ("training", "evaluation") and rest else None
