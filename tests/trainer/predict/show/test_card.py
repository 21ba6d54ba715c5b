"""The model card of an exported folder: the hub's code reads it, it is true, and its Python lines load the folder."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import start

from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.show.card import CardFacts, model_card, published_base
from flowmask.trainer.predict.weights import LoadedWeights, load_dit

RUNS: dict[str, dict[str, Any]] = {
    "dit": {"train.steps": 3},
    "mask_decoder": {"train.steps": 2, "objective.kind": "mask_decoder"},
    "lora": {"train.steps": 2, "lora.rank": 2},
    "video_dit": {"train.steps": 2, "objective.kind": "text_to_video"},
}


def row(card: str, name: str) -> str:
    """The value beside a name in the card's tables."""
    found = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.MULTILINE)
    assert found is not None, name
    return found[1]


@pytest.fixture(scope="module")
def dit_run(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("cards") / "dit"
    assert start(lab, run, RUNS["dit"]) == 0
    return run


@pytest.mark.parametrize("part", RUNS)
def test_the_hub_reads_the_card_of_an_exported_folder_and_its_lines_load_the_folder(
    part: str, lab: Path, dit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import ModelCard

    run = dit_run if part == "dit" else tmp_path / part
    if part != "dit":
        assert start(lab, run, RUNS[part]) == 0
    folder = export(str(run), format="lora" if part == "lora" else "diffusers", out=tmp_path / "shared").path
    card = (folder / "README.md").read_text()
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data["license"] == "other" and data["library_name"] == ("peft" if part == "lora" else "diffusers")
    steps = RUNS[part]["train.steps"]
    assert row(card, "Steps") == f"{steps} of {steps}" and row(card, "Dataset") == "cache `cache`"
    assert row(card, "Base model") == "folder `wan`" and "commit `" in row(card, "Exported by")
    assert "from Wan2.1" not in card and "Wan2.1, from which" not in card  # the tiny Wan was not trained from it
    assert str(lab) not in card and str(tmp_path) not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {"WAN": lab / "wan"}
    exec(code, made)
    assert isinstance(made["vae" if part == "mask_decoder" else "dit"], torch.nn.Module)


def test_a_card_shows_the_scores_of_just_these_weights(dit_run: Path, tmp_path: Path) -> None:
    own = {"weights": {"dit": load_dit(str(dit_run)).sha256}, "jf": 61.25, "j": 60.0, "f": 62.5, "videos": 7}
    others = own | {"weights": {"dit": "0" * 64}, "jf": 99.0}
    for name, scores in (("evaluate", own), ("evaluate_old", others), ("evaluate_torn", "[")):
        (dit_run / name).mkdir()
        (dit_run / name / "scores.json").write_text(scores if isinstance(scores, str) else json.dumps(scores))
    (dit_run / "evaluate" / "config.yaml").write_text("data: {source: mevis, split: valid_u}\n")
    folder = export(str(dit_run), format="diffusers", out=tmp_path / "scored").path
    assert row((folder / "README.md").read_text(), "mevis, valid_u") == "61.2 | 60.0 | 62.5 | 7 | "
    assert "99.0" not in (folder / "README.md").read_text()
    last = export(str(dit_run), format="diffusers", out=tmp_path / "last", ema=False).path
    assert "Scores" not in (last / "README.md").read_text()  # the scores are those of the averaged weights


def test_no_name_leaves_its_place_in_a_card(tmp_path: Path) -> None:
    name = "a`|<b>\n---\n# c\u202e"
    loaded = LoadedWeights({}, {"objective": name, "wan": f"/data/{name}"}, "0" * 64)
    facts = CardFacts(tmp_path / name, name, "dit", loaded, ema=True, dtype=torch.float32, plain=True)
    card = model_card(facts)
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "other"
    assert [line for line in body.splitlines() if line.startswith("# ")] == [f"# {body.strip().splitlines()[0][2:]}"]
    assert all(line.count("|") == 3 for line in body.splitlines() if line.startswith("|"))
    assert "<" not in body and "\u202e" not in body


def test_a_base_is_named_where_the_sizes_are_those_of_a_published_one() -> None:
    small = {f"blocks.{number}.norm2.weight": (1536,) for number in range(30)}
    assert published_base({**small, "patch_embedding.weight": (1536, 32, 1, 2, 2)}) == (
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )
    assert published_base({**small, "blocks.0.attn1.to_q.lora_A.weight": (4, 1536)}) is not None
    assert published_base({**small, "patch_embedding.weight": (128, 32, 1, 2, 2)}) is None
    assert published_base({"decoder.conv_in.weight": (384, 16, 3, 3, 3)}) is not None
    assert published_base({"decoder.conv_in.weight": (32, 16, 3, 3, 3)}) is None and published_base({}) is None
