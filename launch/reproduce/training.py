"""Cost and loss of a training from its rows, read once from front to back, because there may be a million."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmask.models.stored.regular import open_regular
from flowmask.models.stored.typed import is_number
from flowmask.trainer.state.run_folder import row_of

CURVE_POINTS = 80
Curve = tuple[tuple[int, float], ...]  # (step, mean loss since the previous point)


@dataclass(frozen=True)
class Cost:
    """The cost of a training's steps; steps repeated after a kill count once.

    process_hours: hours spent in steps, summed over its processes; pflop: 10^15 operations of the model without
    recomputation, None if they were not counted
    """

    steps: int
    process_hours: float
    examples_per_s: float
    pflop: float | None


def read_training(metrics: Path) -> tuple[Cost, Curve] | None:
    """Cost and loss of a run from its metrics.jsonl; None if that holds no step."""
    steps, seconds, process_s, examples, tflop = 0, 0.0, 0.0, 0.0, 0.0
    counted, curve = True, _Windows()
    for row in _rows(metrics):
        took = row["step_s"]
        steps, seconds = max(steps, row["step"]), seconds + took
        process_s += took * (ranks if is_number(ranks := row.get("world_size")) else 1)
        examples += row["examples_per_s"] * took
        counted = counted and is_number(row.get("model_tflop_per_s"))
        tflop += row["model_tflop_per_s"] * took if counted else 0
        if is_number(row.get("loss")):
            curve.add(row["step"], row["loss"])
    if not seconds:
        return None
    return Cost(steps, process_s / 3600, examples / seconds, tflop / 1000 if counted else None), curve.points()


def mean_cost(costs: Sequence[Cost]) -> Cost | None:
    """The cost of one training, as the mean over several."""
    if not costs:
        return None
    known = [one.pflop for one in costs if one.pflop is not None]
    return Cost(
        max(one.steps for one in costs),
        math.fsum(one.process_hours for one in costs) / len(costs),
        math.fsum(one.examples_per_s for one in costs) / len(costs),
        math.fsum(known) / len(known) if known else None,
    )


class _Windows:
    """Means over windows of equal numbers of steps; the window doubles when there are 2 x CURVE_POINTS of them."""

    def __init__(self) -> None:
        self._size, self._windows = 1, list[list[float]]()  # [last step, sum, count]

    def add(self, step: int, loss: float) -> None:
        if not self._windows or self._windows[-1][2] == self._size:
            if len(self._windows) == 2 * CURVE_POINTS:
                pairs = zip(self._windows[::2], self._windows[1::2], strict=True)
                self._windows = [[b[0], a[1] + b[1], a[2] + b[2]] for a, b in pairs]
                self._size *= 2
            self._windows.append([step, 0.0, 0])
        last = self._windows[-1]
        last[:] = [step, last[1] + loss, last[2] + 1]

    def points(self) -> Curve:
        return tuple((int(step), total / count) for step, total, count in self._windows)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The readable rows; none if there is no such file."""
    try:
        file = os.fdopen(open_regular(path), "rb")
    except OSError:
        return
    with file:
        for line in file:
            row = row_of(line)
            if row is not None and all(
                is_number(row.get(key)) and row[key] > 0 for key in ("step", "step_s", "examples_per_s")
            ):
                yield row
