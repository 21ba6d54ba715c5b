"""Export: the same tensors to the bit in every format, readable by the libraries that the format is for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import start

from flowmask.models.errors import UserError
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.inference import load_segmenter
from flowmask.trainer.predict.weights import load_dit, load_mask_decoder, part_of
from flowmask.trainer.state.checkpoint import read_full
from flowmask.trainer.state.steps import complete

FORMATS = {"diffusers": "", "flowrvs": ".pth", "safetensors": ".safetensors"}


@pytest.fixture(scope="module")
def dit_run(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dit") / "run"
    assert start(lab, out, {"train.steps": 3, "train.lr": 1e-2, "model.text_tokens": 64}) == 0
    return out


@pytest.fixture(scope="module")
def decoder_run(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decoder") / "run"
    assert start(lab, out, {"train.steps": 2, "objective.kind": "mask_decoder"}) == 0
    return out


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_import_export_import_is_exact_for_a_dit(
    dit_run: Path, lab: Path, tmp_path: Path, format: str, ema: bool
) -> None:
    first = load_dit(str(dit_run), ema=ema)
    done = export(str(dit_run), format=format, out=tmp_path / f"once{FORMATS[format]}", ema=ema)
    again = export(str(done.path), format=format, out=tmp_path / f"twice{FORMATS[format]}", ema=ema, wan=lab / "wan")
    for path in (done.path, again.path):
        second = load_dit(str(path), ema=ema)
        assert same(first.state_dict, second.state_dict) and second.sha256 == first.sha256
        for convention in ("text_tokens", "mask_latent_norm", "video_injection", "pixel_norm", "lowercase"):
            assert second.settings[convention] == first.settings[convention]
        assert (second.settings["short_side"], second.settings["long_side"]) == (32, 64)


@pytest.mark.parametrize("format", FORMATS)
def test_import_export_import_is_exact_for_a_mask_decoder(decoder_run: Path, tmp_path: Path, format: str) -> None:
    first = load_mask_decoder(str(decoder_run))
    done = export(str(decoder_run), format=format, out=tmp_path / f"decoder{FORMATS[format]}")
    assert part_of(str(done.path)).name == "mask_decoder"
    assert same(first.state_dict, load_mask_decoder(str(done.path)).state_dict)


@pytest.mark.parametrize("format", FORMATS)
def test_formats_convert_into_each_other_without_loss(dit_run: Path, lab: Path, tmp_path: Path, format: str) -> None:
    sha256 = load_dit(str(dit_run)).sha256
    source = export(str(dit_run), format=format, out=tmp_path / f"source{FORMATS[format]}").path
    for other in FORMATS:
        done = export(str(source), format=other, out=tmp_path / f"other{FORMATS[other]}", wan=lab / "wan")
        assert load_dit(str(done.path)).sha256 == sha256


def test_a_flowrvs_file_holds_the_last_and_the_averaged_weights(dit_run: Path, tmp_path: Path) -> None:
    path = export(str(dit_run), format="flowrvs", out=tmp_path / "both.pth").path
    newest = complete(dit_run / "checkpoints")[0]
    for ema, kind in ((True, "ema"), (False, "master")):
        assert same(load_dit(str(path), ema=ema).state_dict, read_full(newest, kind=kind))
    torch.load(path, weights_only=True)


def test_the_diffusers_folder_loads_with_diffusers(dit_run: Path, decoder_run: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    path = export(str(dit_run), format="diffusers", out=tmp_path / "dit").path
    model: Any = WanTransformer3DModel.from_pretrained(path / "transformer")
    assert same(dict(model.state_dict()), load_dit(str(dit_run)).state_dict)
    assert model.config.in_channels == 32 and model.config.out_channels == 16
    decoder = export(str(decoder_run), format="diffusers", out=tmp_path / "decoder").path
    vae: Any = AutoencoderKLWan.from_pretrained(decoder / "mask_decoder")
    trained = load_mask_decoder(str(decoder_run)).state_dict
    assert all(torch.equal(vae.state_dict()[name], value) for name, value in trained.items())


def test_an_exported_dit_brings_its_decoder_and_predicts_as_its_run(
    lab: Path, decoder_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert start(lab, run, {"train.steps": 2, "model.mask_decoder": str(decoder_run)}) == 0
    folder = export(str(run), format="diffusers", out=tmp_path / "export").path
    from flowmask.models.config import SamplerConfig

    ours = load_segmenter(str(run), sampler=SamplerConfig())
    theirs = load_segmenter(str(folder), sampler=SamplerConfig(), wan=lab / "wan")
    assert ours.weights == theirs.weights and ours.box == theirs.box
    settings = json.loads((folder / "flowmask.json").read_text())
    assert str(lab) not in json.dumps(settings)  # no path of the training's machine


def test_training_starts_from_an_export_as_from_its_run(lab: Path, dit_run: Path, tmp_path: Path) -> None:
    from runs import losses

    export(str(dit_run), format="safetensors", out=tmp_path / "w.safetensors")
    common = {"train.steps": 2, "model.text_tokens": 64}
    for name, source in (("a", dit_run), ("b", tmp_path / "w.safetensors")):
        assert start(lab, tmp_path / name, {**common, "model.init": str(source)}) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_bfloat16_is_half_the_size_and_rounds_only(dit_run: Path, tmp_path: Path) -> None:
    whole = export(str(dit_run), format="safetensors", out=tmp_path / "whole.safetensors").path
    half = export(str(dit_run), format="safetensors", out=tmp_path / "half.safetensors", dtype=torch.bfloat16).path
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    rounded = load_dit(str(half)).state_dict
    assert all(torch.equal(rounded[n], t.bfloat16().float()) for n, t in load_dit(str(whole)).state_dict.items())


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(dit_run: Path, lab: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"proj_out.bias": torch.ones(3)}, tmp_path / "stranger.safetensors")
    (tmp_path / "there.pth").write_bytes(b"mine")
    cases: list[tuple[str, dict[str, Any], str]] = [
        (str(dit_run), {"format": "onnx"}, "known formats: diffusers, flowrvs, safetensors"),
        (str(dit_run), {"format": "flowrvs", "out": tmp_path / "there.pth"}, "already exists"),
        (str(dit_run), {"format": "flowrvs", "out": tmp_path / "x.bin"}, "must end in .pth"),
        (str(tmp_path / "nothing"), {"format": "flowrvs", "out": tmp_path / "x.pth"}, "does not exist"),
        (str(tmp_path / "nothing"), {"format": "flowrvs"}, "does not exist; give a run"),
        (str(tmp_path), {"format": "flowrvs", "out": tmp_path / "x.pth"}, "neither a run folder"),
        (str(dit_run), {"format": "diffusers", "out": tmp_path / "x", "wan": tmp_path / "gone"}, "give --wan"),
        (
            str(tmp_path / "stranger.safetensors"),
            {"format": "diffusers", "out": tmp_path / "x", "wan": lab / "wan"},
            "does not fit the model",
        ),
    ]
    for source, options, message in cases:
        with pytest.raises(UserError, match=message) as refusal:
            export(source, **options)
        assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stranger.safetensors", "there.pth"]
    assert (tmp_path / "there.pth").read_bytes() == b"mine"


@pytest.mark.parametrize("format", ["flowrvs", "safetensors"])
def test_settings_whose_name_is_damaged_are_damage_and_not_a_file_of_another_tool(
    dit_run: Path, tmp_path: Path, format: str
) -> None:
    path = export(str(dit_run), format=format, out=tmp_path / f"w{FORMATS[format]}").path
    content = path.read_bytes()
    assert content.count(b"flowmask") == 1
    path.write_bytes(content.replace(b"flowmask", b"nlowmask"))
    with pytest.raises(UserError, match=r"is damaged .*'nlowmask'.*get it again"):
        load_dit(str(path))
