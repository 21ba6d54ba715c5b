"""A folder without trained weights is refused in one line with its kind and the right source."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_export import DATA, write_golden_export

from flowmask.models.errors import UserError
from flowmask.models.files import MARK
from flowmask.models.folders.output_folder import Kind, OutputFolder
from flowmask.models.weights.tiny_wan import write_tiny_wan
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.weights import load_dit, load_mask_decoder

OLDER = Path(__file__).parents[2] / "golden" / "older"
BASE = "is a Wan2.1 folder"
KINDS: dict[str, str] = {  # folder of `lab` -> its name in the message
    "older/cache": "is a cache, from which alone no",
    "older/evaluation": "is an evaluation, from which alone no",
    "data": "is a dataset, from which alone no",
    "data/valid_u": "is a dataset, from which alone no",
    "wan": BASE,
    "wan/vae": "is the VAE of a Wan2.1 folder, from which alone no",
    "wan/text_encoder": "is the text encoder of a Wan2.1 folder, from which alone no",
    "wan/tokenizer": "is the tokenizer of a Wan2.1 folder, from which alone no",
    "wan/transformer": "is the transformer/ of a Wan2.1 folder or an export, from which alone no",
    "renamed": BASE,
    "marked": "is a thing of ours, from which alone no",
    "begun": "is a run, from which alone no",
    "empty": "is neither a run folder (no checkpoints/) nor an export (no ",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lab = tmp_path_factory.mktemp("lab")
    write_tiny_wan(lab / "wan")
    (lab / "older").symlink_to(OLDER)
    (lab / "data").symlink_to(DATA)
    shutil.copytree(lab / "wan", lab / "renamed")
    (lab / "renamed" / "model_index.json").unlink()
    OutputFolder(lab / "marked", Kind("a thing of ours", older=lambda _: ()))
    (lab / "begun").mkdir()
    (lab / "begun" / MARK).write_text(json.dumps({"kind": "a run", "id": "0"}))
    (lab / "empty").mkdir()
    return lab


def refusal(load: Callable[[str], object], source: Path) -> str:
    with pytest.raises(UserError) as raised:
        load(str(source))
    assert str(raised.value).startswith(f"{source} ") and "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_another_kind_is_named_and_what_to_give_is_said(kind: str, lab: Path) -> None:
    for load, wanted in (
        (load_dit, "give a run that trained the DiT"),
        (load_mask_decoder, "give a run that trained a mask decoder, an export of it, a FlowRVS .pth file or 'vae'"),
    ):
        said = refusal(load, lab / kind)
        assert KINDS[kind] in said and wanted in said


def test_a_wan_folder_with_a_dit_that_takes_the_video_or_with_our_settings_is_taken(lab: Path, tmp_path: Path) -> None:
    golden = write_golden_export(tmp_path)
    assembled = shutil.copytree(golden.parent / "wan", tmp_path / "assembled")
    shutil.rmtree(assembled / "transformer")
    shutil.copytree(golden / "transformer", assembled / "transformer")
    assert load_dit(str(assembled)).sha256 == load_dit(str(golden)).sha256
    ours = shutil.copytree(lab / "wan", tmp_path / "ours")
    (ours / "flowmask.json").write_text("{}")
    assert load_dit(str(ours)).sha256


def test_weights_of_the_other_part_are_told_in_each_form(tmp_path: Path) -> None:
    parts = {"run": "dit", "decoder": "mask_decoder"}
    for name, made in parts.items():
        load, needed = (load_mask_decoder, "mask_decoder") if made == "dit" else (load_dit, "dit")
        run = OLDER / name
        assert f"weights of {needed} are needed" in refusal(load, run)
        folder = export(str(run), format="diffusers", out=tmp_path / name, wan=OLDER / "wan").path
        assert f"is an export of {made}, without a" in refusal(load, folder)
        file = export(str(run), format="safetensors", out=tmp_path / f"{name}.safetensors").path
        assert f"weights of {needed} are needed" in refusal(load, file)
