"""Cost and loss of a training from its rows: against hand counts, at any length, for any content of the file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flowmask.launch.reproduce.training import CURVE_POINTS, read_training


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "step_s": 2.0, "examples_per_s": 16.0, "loss": float(step), "world_size": 4} | more


def test_the_cost_is_that_of_its_steps(tmp_path: Path) -> None:
    rows = [row(1, model_tflop_per_s=3.0), row(2, step_s=6.0, examples_per_s=8.0, model_tflop_per_s=1.0)]
    found = read_training(write(tmp_path / "rows", rows))
    assert found is not None and found[0].steps == 2
    assert found[0].process_hours == pytest.approx(8 * 4 / 3600)
    assert found[0].examples_per_s == pytest.approx((2 * 16 + 6 * 8) / 8)
    assert found[0].pflop == pytest.approx((2 * 3 + 6 * 1) / 1000)
    assert found[1] == ((1, 1.0), (2, 2.0))


@pytest.mark.parametrize("steps", [1, 2 * CURVE_POINTS, 2 * CURVE_POINTS + 1, 1000, 4097])
def test_a_curve_of_any_length_has_few_points_and_loses_no_step(tmp_path: Path, steps: int) -> None:
    found = read_training(write(tmp_path / "rows", [row(step) for step in range(1, steps + 1)]))
    assert found is not None and len(found[1]) <= 2 * CURVE_POINTS and found[1][-1][0] == steps
    ends = [0, *(step for step, _ in found[1])]
    sums = [mean * (after - before) for (_, mean), before, after in zip(found[1], ends, ends[1:], strict=False)]
    assert math.fsum(sums) == pytest.approx(steps * (steps + 1) / 2)


def test_lines_that_are_no_step_are_passed_over_and_a_file_of_none_says_nothing(tmp_path: Path) -> None:
    strange = ["", "{", "[1]", "null", '{"step": "1"}', '{"step": NaN}', row(1, step_s=0), row(1, step_s="x"), row(1.5)]  # type: ignore[arg-type]
    assert read_training(write(tmp_path / "strange", strange)) is None
    assert read_training(tmp_path / "missing") is None and read_training(tmp_path) is None
    mixed = [*strange, row(3, loss=None, world_size="many"), row(4, loss=1e400)]
    found = read_training(write(tmp_path / "mixed", mixed))
    assert found is not None and found[0].steps == 4 and found[0].pflop is None and found[1] == ()
