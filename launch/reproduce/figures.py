"""The figures of a study, gathered from what its jobs wrote: nothing that was not measured there."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowmask.launch.reproduce.study import RowConfig, Study, Trial
from flowmask.models.stored.sealed import parse_json
from flowmask.trainer.score.compare.evaluation import Evaluated, open_evaluation
from flowmask.trainer.score.compare.seeds import over_seeds
from flowmask.trainer.score.intervals import Interval
from flowmask.trainer.score.metrics import MAIN
from flowmask.trainer.score.store import SCORES
from flowmask.trainer.state.run_folder import METRICS

CURVE_POINTS = 80


@dataclass(frozen=True)
class Value:
    """A mean over seeds, or a paired difference, in J&F points. interval: of 95 %; None where nothing can vary."""

    mean: float
    interval: Interval | None

    @property
    def is_sure(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Cost:
    """What one training took, by its own rows, steps that were taken again after a kill among them.

    process_hours: hours of all its processes; pflop: of the model, without recomputation; None: nobody counts them
    """

    steps: int
    process_hours: float
    examples_per_s: float
    pflop: float | None


@dataclass(frozen=True)
class RowFigures:
    """What is known of a row. scores: by seed, of those that are done; against: the difference to that row."""

    row: RowConfig
    seeds: int
    scores: dict[int, Evaluated] = field(default_factory=dict)
    by_seed: dict[int, float] = field(default_factory=dict)
    mean: Value | None = None
    against: Value | None = None
    published_against: float | None = None
    cost: Cost | None = None
    curves: tuple[tuple[tuple[int, float], ...], ...] = ()


def collect(study: Study) -> list[RowFigures]:
    """Every row of a study, as far as it is done."""
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
    costs, curves = [], []
    for trial in trained:
        rows = list(_rows(trial.run / METRICS))
        if rows:
            costs.append(_cost(rows))
            curves.append(_curve(rows))
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
        _mean_cost(costs),
        tuple(curves),
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a run that can be read; none where there is no such file."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(_is_number(row.get(key)) for key in ("step", "step_s", "examples_per_s")):
            yield row


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _cost(rows: Sequence[dict[str, Any]]) -> Cost:
    seconds = math.fsum(row["step_s"] for row in rows)
    tflop = [row["model_tflop_per_s"] * row["step_s"] for row in rows if _is_number(row.get("model_tflop_per_s"))]
    return Cost(
        steps=max(int(row["step"]) for row in rows),
        process_hours=math.fsum(row["step_s"] * row.get("world_size", 1) for row in rows) / 3600,
        examples_per_s=math.fsum(row["examples_per_s"] * row["step_s"] for row in rows) / seconds,
        pflop=math.fsum(tflop) / 1000 if tflop else None,
    )


def _mean_cost(costs: Sequence[Cost]) -> Cost | None:
    """Of one training, the mean over the seeds."""
    if not costs:
        return None
    known = [one.pflop for one in costs if one.pflop is not None]
    return Cost(
        max(one.steps for one in costs),
        math.fsum(one.process_hours for one in costs) / len(costs),
        math.fsum(one.examples_per_s for one in costs) / len(costs),
        math.fsum(known) / len(known) if known else None,
    )


def _curve(rows: Sequence[dict[str, Any]]) -> tuple[tuple[int, float], ...]:
    """(last step, mean loss) of at most CURVE_POINTS windows of steps."""
    known = {int(row["step"]): float(row["loss"]) for row in rows if _is_number(row.get("loss"))}
    steps = sorted(known)
    size = max(1, math.ceil(len(steps) / CURVE_POINTS))
    windows = (steps[start : start + size] for start in range(0, len(steps), size))
    return tuple((window[-1], math.fsum(known[s] for s in window) / len(window)) for window in windows)


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
