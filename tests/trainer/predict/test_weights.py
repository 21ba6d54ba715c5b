"""Weights by name: the same tensors from any container, and one line for any mistake."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import start
from safetensors.torch import load_file, save_file
from torch import nn

from flowmask.models.errors import WeightsError
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.weights import content_sha256, load_dit, load_mask_decoder, own_encoder, start_from
from flowmask.trainer.state.checkpoint import read_full
from flowmask.trainer.state.steps import complete


@pytest.fixture(scope="module")
def trained(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert start(lab, out, {"train.steps": 4, "checkpoint.every_steps": 2}) == 0
    return out


def test_a_run_gives_its_newest_averaged_weights_and_the_conventions_they_know(lab: Path, trained: Path) -> None:
    loaded = load_dit(str(trained))
    expected = read_full(trained / "checkpoints" / "latest", kind="ema")
    assert all(torch.equal(loaded.state_dict[name], value) for name, value in expected.items())
    assert loaded.settings == {
        "objective": "flow_matching",
        "text_tokens": 256,
        "mask_latent_norm": "none",
        "video_injection": True,
        "pixel_norm": "half",
        "lowercase": True,
        "encoder_dtype": "float32",
        "wan": str(lab / "wan"),
        "mask_decoder": "vae",
    }
    assert load_dit(str(trained), ema=False).sha256 != loaded.sha256
    assert load_dit(str(complete(trained / "checkpoints")[1])).sha256 != loaded.sha256


def test_a_run_whose_newest_checkpoint_is_damaged_is_refused_and_the_step_to_ask_for_is_named(
    trained: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    newest, before = complete(run / "checkpoints")
    flip(next(newest.glob("rank_*")))
    for source in (run, newest):
        with pytest.raises(WeightsError, match=rf"{newest.name}/rank_00000\.safetensors is damaged"):
            load_dit(str(source))
    with pytest.raises(WeightsError, match=rf"give {before}, the newest undamaged one"):
        load_dit(str(run))
    assert load_dit(str(before)).sha256 == content_sha256(read_full(before))
    next(before.glob("rank_*")).unlink()
    with pytest.raises(WeightsError, match="it has no undamaged checkpoint"):
        load_dit(str(run))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("format", ["diffusers", "safetensors", "flowrvs"])
@pytest.mark.parametrize("changed", ["weights", "settings"])
def test_an_export_whose_weights_or_settings_have_changed_is_refused(
    trained: Path, tmp_path: Path, format: str, changed: str
) -> None:
    suffix = {"diffusers": "", "safetensors": ".safetensors", "flowrvs": ".pth"}[format]
    path = export(str(trained), format=format, out=tmp_path / f"out{suffix}").path
    assert load_dit(str(path)).sha256 == load_dit(str(trained)).sha256
    files = {
        "weights": path / "transformer" / "diffusion_pytorch_model.safetensors",
        "settings": path / "flowmask.json",
    }
    file = files[changed] if format == "diffusers" else path
    content = file.read_bytes()
    if changed == "settings":
        assert content.count(b"flow_matching") == 1
        content = content.replace(b"flow_matching", b"mask_decoder_")
    else:
        place = content.index(load_dit(str(trained)).state_dict["proj_out.weight"].numpy().tobytes())
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    file.write_bytes(content)
    with pytest.raises(WeightsError) as raised:
        load_dit(str(path))
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_an_export_gives_the_same_tensors_and_its_recorded_conventions(trained: Path, tmp_path: Path) -> None:
    loaded = load_dit(str(trained))
    (tmp_path / "transformer").mkdir()
    save_file(loaded.state_dict, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "flowmask.json").write_text(json.dumps({"text_tokens": 64}))
    exported = load_dit(str(tmp_path))
    assert exported.sha256 == loaded.sha256 and exported.settings == {"text_tokens": 64}


def test_a_published_file_gives_its_weights(tmp_path: Path) -> None:
    state = {"vae.decoder.conv_out.weight": torch.rand(1, 2, 3, 3, 3), "vae.encoder.x": torch.rand(2)}
    torch.save({"model": state}, tmp_path / "decoder.pth")
    loaded = load_mask_decoder(str(tmp_path / "decoder.pth"))
    assert torch.equal(loaded.state_dict["decoder.conv_out.weight"], state["vae.decoder.conv_out.weight"])


def test_what_is_no_source_of_weights_is_one_line(trained: Path, tmp_path: Path) -> None:
    for source, message in [(tmp_path / "nothing", "does not exist"), (tmp_path, "neither a run folder")]:
        with pytest.raises(WeightsError, match=message):
            load_dit(str(source))
    with pytest.raises(WeightsError, match="trained flow_matching, but weights of mask_decoder"):
        load_mask_decoder(str(trained))


def test_equal_weights_have_equal_hashes_and_no_others() -> None:
    state = {"b": torch.ones(2, 3), "a": torch.zeros(1)}
    assert content_sha256(state) == content_sha256(dict(reversed(state.items())))
    assert content_sha256(state) != content_sha256({**state, "a": torch.full((1,), 1e-9)})
    assert content_sha256(state) != content_sha256({**state, "b": torch.ones(3, 2)})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("part", ["dit", "mask_decoder"])
def test_a_state_dict_alone_is_the_same_source_in_any_container(part: str, suffix: str, tmp_path: Path) -> None:
    parity = Path(__file__).parents[2] / "golden" / "parity"
    state = load_file(parity / {"dit": "dit_dvi"}.get(part, part) / "weights.safetensors")
    path = tmp_path / f"raw{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    if part == "dit":
        loaded = load_dit(str(path), ema=False)
        assert loaded.sha256 == content_sha256(state)
        return
    decoder, encoder = load_mask_decoder(str(path)).state_dict, own_encoder(str(path))
    plain = {name.removeprefix("vae."): tensor for name, tensor in state.items()}
    assert encoder and decoder.keys() | encoder.keys() == plain.keys() and not decoder.keys() & encoder.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in (decoder | encoder).items())


def test_a_file_without_averaged_weights_gives_its_last_ones_and_a_training_must_ask_for_those(
    trained: Path, tmp_path: Path
) -> None:
    state = load_dit(str(trained), ema=False)
    torch.save({"model": state.state_dict}, tmp_path / "dit.pth")
    loaded = load_dit(str(tmp_path / "dit.pth"))
    assert loaded.sha256 == state.sha256 and loaded.last_only
    assert not load_dit(str(tmp_path / "dit.pth"), ema=False).last_only and not load_dit(str(trained)).last_only
    settings = {"objective": "flow_matching"}
    with pytest.raises(WeightsError, match=r"set model\.init_ema=false"):
        start_from(str(tmp_path / "dit.pth"), nn.Module(), ema=True, settings=settings)
