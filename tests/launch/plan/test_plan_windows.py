"""The plan of an evaluation whose videos are cut into windows."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from flowmask.data_pipeline.sources.synthetic import write_synthetic
from flowmask.launch.cli.main import app
from flowmask.models.weights.tiny_wan import write_tiny_wan

CONFIGS = Path(__file__).parents[3] / "configs"
runner = CliRunner()


def test_an_evaluation_in_windows_is_planned_as_passes_of_one_window_each(tmp_path: Path) -> None:
    data, wan = tmp_path / "data", tmp_path / "wan"
    write_synthetic(data, split="valid_u", videos=1, seed=0, frames=17, size=64)
    write_tiny_wan(wan)

    def plan(*window: str) -> dict[str, Any]:
        named = [f"model.wan={wan}", f"data.root={data}", "data.split=valid_u", "box.height_px=320", "box.width_px=320"]
        command = ["plan", str(CONFIGS / "evaluate_mevis.yaml"), "--json", "--gpu", "A100"]
        done = runner.invoke(app, [*command, *named, *window])
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    whole, same, cut = plan(), plan("window.frames=17", "window.overlap=4"), plan("window.frames=9", "window.overlap=0")
    assert (same["flop"], same["device_bytes"]) == (whole["flop"], whole["device_bytes"])
    assert (whole["longest"], cut["longest"]) == ("17x320x320", "9x320x320")
    assert (cut["videos"], cut["sentences"]) == (1, whole["sentences"])
    assert whole["flop"] < cut["flop"] < 1.2 * whole["flop"]  # one frame twice, and the text again
