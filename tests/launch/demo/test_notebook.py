"""The notebook of the smoke demo is stored without outputs, and its cells run unchanged."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NOTEBOOK = json.loads((Path(__file__).parents[3] / "docs" / "examples" / "smoke.ipynb").read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def shown_by(cell: dict[str, Any], names: dict[str, Any]) -> Any:
    """Run a cell with these names; return the value of its last expression, which Jupyter shows."""
    *body, last = ast.parse("".join(cell["source"])).body
    if isinstance(last, ast.Expr):
        last = ast.Assign([ast.Name("_", ast.Store())], last.value)
    code = ast.fix_missing_locations(ast.Module([*body, last], []))
    exec(compile(code, "cell", "exec"), names)
    return names.pop("_", None)


def test_the_notebook_is_stored_without_outputs() -> None:
    assert NOTEBOOK["nbformat"] == 4 and CELLS
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)


def test_the_cells_of_the_notebook_show_scores_losses_and_an_overlay(
    smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/smoke").symlink_to(smoke)  # finished, so the first cell runs no stage
    names: dict[str, Any] = {}
    _, truth, scores, losses, overlay = [shown_by(cell, names) for cell in CELLS]
    assert scores.keys() == {"jf", "j", "f", "jf_shuffled_text"}
    assert [step for step, _ in losses] == list(range(1, 13))
    assert isinstance(truth, Image.Image) and isinstance(overlay, Image.Image)
    colours = truth.getcolors(truth.width * truth.height)
    assert colours is not None and (230, 97, 0) in {colour for _, colour in colours}  # the contour of a mask
    assert overlay.width == 3 * names["pictures"][0].width
