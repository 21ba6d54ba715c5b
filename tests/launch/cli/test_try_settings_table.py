"""`flowmask evaluate --try-settings`: a row for each combination, the best first; the same as JSON; no file written."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from golden_export import BOX, DATA, write_published
from typer.testing import CliRunner

from flowmask.launch.cli.main import app
from flowmask.models.errors import UserError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of weights with two unknown conventions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("golden")
    write_published(folder)
    tree = {
        "out": str(folder / "out"),
        "checkpoint": str(folder / "dit.pth"),
        "mask_decoder": str(folder / "decoder.pth"),
        "model": {"wan": str(folder / "wan")},
        "data": {"source": "mevis", "root": str(DATA), "split": "valid_u"},
        "box": BOX,
        "precision": "fp32",
        "device": "cpu",
        "max_videos": 1,
        "conventions": {"pixel_norm": "half", "text_tokens": 64},
    }
    path = folder / "evaluate.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def printed(config: Path, *more: str) -> str:
    return CliRunner().invoke(app, ["evaluate", str(config), "--try-settings", *more], catch_exceptions=False).stdout


def test_the_table_has_a_row_for_each_combination_the_best_first_and_json_has_the_same_numbers(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    before = {path: path.read_bytes() for path in config.parent.rglob("*") if path.is_file()}
    known = json.loads(printed(config, "--json"))
    assert [one["jf"] for one in known] == sorted((one["jf"] for one in known), reverse=True) and len(known) == 4
    shown = printed(config).splitlines()
    cells = [[cell.strip() for cell in line.split(bar)] for line in shown if (bar := "│") in line]
    names = ("pixel_norm", "text_tokens", "mask_latent_norm", "lowercase")
    wanted = [
        [*(str(one[name]).lower() for name in names), *(f"{one[name]:.2f}" for name in ("jf", "j", "f"))]
        for one in known
    ]
    assert [[cell for cell in row if cell] for row in cells] == wanted
    assert {path: path.read_bytes() for path in config.parent.rglob("*") if path.is_file()} == before


def test_on_a_cluster_it_is_refused_with_what_to_do(config: Path) -> None:
    with pytest.raises(UserError, match=r"in this process only; run it in an allocation with launch\.cluster=local"):
        printed(config, "launch.cluster=slurm")
