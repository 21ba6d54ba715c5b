"""The figures of a study, read from the files of its jobs; every number was measured there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flowmask.launch.reproduce.study import RowConfig, Study, Trial
from flowmask.launch.reproduce.training import Cost, Curve, mean_cost, read_training
from flowmask.trainer.score.compare.evaluation import Evaluated, open_evaluation
from flowmask.trainer.score.compare.seeds import over_seeds
from flowmask.trainer.score.intervals import Interval
from flowmask.trainer.score.metrics import MAIN
from flowmask.trainer.score.store import SCORES
from flowmask.trainer.state.run_folder import METRICS


@dataclass(frozen=True)
class Value:
    """A mean over seeds, or a paired difference, in J&F points. interval: 95 %; None if nothing varies."""

    mean: float
    interval: Interval | None

    @property
    def is_sure(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class RowFigures:
    """Figures of a row so far. scores: by seed, of finished trials; against: the paired difference to another row."""

    row: RowConfig
    seeds: int
    scores: dict[int, Evaluated] = field(default_factory=dict)
    by_seed: dict[int, float] = field(default_factory=dict)
    mean: Value | None = None
    against: Value | None = None
    published_against: float | None = None
    cost: Cost | None = None
    curves: tuple[Curve, ...] = ()


def collect(study: Study) -> list[RowFigures]:
    """The figures of every row of a study, from the finished part."""
    done: dict[str, dict[int, Evaluated]] = {row.name: {} for row in study.config.rows}
    trained: dict[str, list[Trial]] = {row.name: [] for row in study.config.rows}
    for trial in study.trials():
        if (trial.evaluation / SCORES).is_file():
            done[trial.row.name][trial.seed] = open_evaluation(trial.evaluation)
        if trial.row.of is None:
            trained[trial.row.name].append(trial)
    published = {row.name: row.published for row in study.config.rows}
    return [_row(row, study.seeds(row), done, trained[row.name], published) for row in study.config.rows]


def _row(
    row: RowConfig,
    seeds: int,
    done: dict[str, dict[int, Evaluated]],
    trained: Sequence[Trial],
    published: dict[str, float | None],
) -> RowFigures:
    scores = done[row.name]
    read = [found for trial in trained if (found := read_training(trial.run / METRICS)) is not None]
    other = done[row.against] if row.against is not None else {}
    both = sorted(scores.keys() & other.keys())
    theirs, before = row.published, published[row.against] if row.against else None
    return RowFigures(
        row,
        seeds,
        scores,
        {seed: over_seeds([one])[0] for seed, one in scores.items()},
        Value(*over_seeds(list(scores.values()))) if scores else None,
        Value(*over_seeds([scores[s] for s in both], [other[s] for s in both])) if both else None,
        theirs - before if theirs is not None and before is not None else None,
        mean_cost([cost for cost, _ in read]),
        tuple(curve for _, curve in read),
    )


def as_json(figures: Sequence[RowFigures]) -> str:
    """The numbers of the page, for programs."""
    rows = [
        {
            "row": one.row.name,
            "title": one.row.title,
            "metric": MAIN,
            "published": one.row.published,
            "seeds_wanted": one.seeds,
            "by_seed": {str(seed): round(value, 4) for seed, value in one.by_seed.items()},
            "mean": _pair(one.mean),
            "against": one.row.against,
            "difference": _pair(one.against),
            "published_difference": one.published_against,
            "cost": None if one.cost is None else vars(one.cost),
        }
        for one in figures
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def _pair(value: Value | None) -> dict[str, Any] | None:
    return None if value is None else {"value": value.mean, "interval": value.interval}
