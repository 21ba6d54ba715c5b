"""Wan2.1's original files become a folder in the diffusers layout, bit for bit, or are refused in one line."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from published import shapes_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from flowmask.launch.cli.main import app
from flowmask.models.dit import PATCH_KEY
from flowmask.models.errors import UserError
from flowmask.models.vae import encode_moments
from flowmask.models.weights import import_wan as importing
from flowmask.models.weights.import_wan import import_wan
from flowmask.models.weights.original import DIT, PARTS, TEXT, VAE
from flowmask.models.weights.tiny_wan import write_tiny_wan
from flowmask.models.weights.wan import WanFolder

STEM = "diffusion_pytorch_model"
TEXT_BLOCK = {  # names of UMT5, which no library's converter knows
    "norm1": "layer.0.layer_norm",
    **{f"attn.{one}": f"layer.0.SelfAttention.{one}" for one in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def converted(part: str, names: Mapping[str, str]) -> dict[str, str]:
    """diffusers' names of the original ones, by diffusers' own converter; for UMT5 by the table above."""
    from diffusers.loaders import single_file_utils as theirs

    if part == "text_encoder":
        known = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
        for block in range(24):
            ends = {f"blocks.{block}.{a}.weight": f"encoder.block.{block}.{b}.weight" for a, b in TEXT_BLOCK.items()}
            known |= ends
        return {known[name]: value for name, value in names.items()}
    convert: Any = {
        "transformer": theirs.convert_wan_transformer_to_diffusers,
        "vae": theirs.convert_wan_vae_to_diffusers,
    }
    return dict(convert[part](dict(names)))


@pytest.mark.parametrize(
    ("part", "size", "count"), [(DIT, "1.3B", 825), (DIT, "14B", 1095), (VAE, "1.3B", 194), (TEXT, "1.3B", 242)]
)
def test_the_tables_lead_every_published_name_to_one_original_name_and_tell_the_shapes(
    part: Any, size: str, count: int
) -> None:
    shapes = shapes_of(part.folder, size)
    originals = {part.original(name): name for name in shapes}
    assert len(originals) == len(shapes) == count and part.mark in originals
    assert converted(part.folder, originals) == {name: name for name in shapes}
    model = part.model({original: shapes[name] for original, name in originals.items()}, {})
    assert part.names(model) == originals
    state = model.state_dict()
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan whose VAE has the published layers at a small width."""
    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("ours") / "wan"
    write_tiny_wan(folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=8).save_pretrained(folder / "vae")
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def originals(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in Wan-AI's layout: the text encoder in bf16, the DiT in shards."""
    folder = tmp_path_factory.mktemp("theirs") / "Wan2.1-T2V"
    (folder / "google").mkdir(parents=True)
    shutil.copytree(wan / "tokenizer", folder / "google" / "umt5-xxl")
    for part in PARTS:
        state = {part.original(name): tensor for name, tensor in tensors_of(wan / part.folder).items()}
        if part is not DIT:
            torch.save({k: v.bfloat16() if part is TEXT else v for k, v in state.items()}, folder / part.file)
            continue
        shards = [dict(list(state.items())[begin::2]) for begin in range(2)]
        names = [f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, folder / name)
        index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    heads = json.loads((wan / "transformer" / "config.json").read_text())["num_attention_heads"]
    told = {"_class_name": "WanModel", "model_type": "t2v", "num_heads": heads, "eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def assert_alike(out: Path, wan: Path) -> None:
    """All parts have the same outputs as those of `wan`, to the bit."""
    theirs, ours = WanFolder(out), WanFolder(wan)
    torch.manual_seed(0)
    latent, clip, text = torch.randn(1, 16, 2, 4, 4), torch.rand(1, 3, 5, 32, 32) * 2 - 1, torch.randn(1, 7, 64)
    with torch.no_grad():
        velocities = [
            one.transformer(video_injection=False)(latent, torch.tensor([500]), text).sample for one in (theirs, ours)
        ]
    moments = [encode_moments(one.vae(), clip)[0] for one in (theirs, ours)]
    sentences = [one.text_encoder(torch.bfloat16)("a red circle", max_tokens=16) for one in (theirs, ours)]
    for pair in (velocities, moments, sentences):
        assert torch.equal(*pair) and pair[0].any()


@pytest.mark.parametrize("shard_bytes", [1 << 31, 50_000])
def test_an_original_folder_is_refused_with_the_command_that_makes_one_of_equal_outputs(
    originals: Path, wan: Path, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "SHARD_BYTES", shard_bytes)
    with pytest.raises(UserError) as refused:
        WanFolder(originals)
    (command,) = re.findall(r"\(flowmask (.+) OUT\)", str(refused.value))
    done = CliRunner().invoke(app, [*command.split(), str(tmp_path / "out" / "wan")])
    assert done.exit_code == 0, done.output
    out = tmp_path / "out" / "wan"
    assert (len(list((out / "transformer").glob("*.safetensors"))) > 1) == (shard_bytes < 1 << 20)
    for part in PARTS:
        stored, known = tensors_of(out / part.folder), tensors_of(wan / part.folder)
        assert stored.keys() == known.keys()
        assert all(torch.equal(tensor, known[name].to(tensor.dtype)) for name, tensor in stored.items())
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16 if part is TEXT else torch.float32}
    assert_alike(out, wan)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in wan.iterdir())
    assert not list(out.parent.glob(".flowmask*"))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.folder)
def test_a_file_of_one_part_becomes_that_part_with_or_without_comfyuis_prefix(
    part: Any, suffix: str, prefix: str, wan: Path, tmp_path: Path
) -> None:
    known, file, said = tensors_of(wan / part.folder), tmp_path / f"part.{suffix}", []
    state = {prefix + part.original(name): tensor for name, tensor in known.items()}
    if suffix == "pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    import_wan(file, tmp_path / "out", say=said.append)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [part.folder] and f"{len(known)} tensors" in said[0]
    stored = tensors_of(tmp_path / "out" / part.folder)
    assert stored.keys() == known.keys() and all(torch.equal(stored[name], known[name]) for name in known)


class Harm:
    """A pickle that runs a command."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm"),)


def dit_file(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The changed DiT as one file."""
    state = load_file(folder / f"{STEM}-00001-of-00002.safetensors")
    state |= load_file(folder / f"{STEM}-00002-of-00002.safetensors")
    change(state)
    save_file(state, file := folder.parent / "changed.safetensors")
    return file


def experts(folder: Path, *, named: str) -> Path:
    (folder / named).mkdir()
    return folder


def harmful(folder: Path) -> Path:
    torch.save({"encoder.conv1.weight": Harm()}, folder / VAE.file)
    return folder


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


Q = "blocks.0.self_attn.q.weight"
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda f: f / "none", "does not exist"),
    "a missing tensor": (lambda f: dit_file(f, lambda s: s.pop("head.modulation")), "1 missing (head.modulation)"),
    "a tensor too many": (lambda f: dit_file(f, lambda s: s.update(b=torch.ones(1))), "1 unexpected (b)"),
    "another shape": (lambda f: dit_file(f, lambda s: s.update({Q: torch.ones(2, 2)})), f"1 reshaped ({Q} (2, 2)"),
    "no finite number": (lambda f: dit_file(f, lambda s: s[Q].fill_(torch.nan)), "not finite"),
    "eight bits": (lambda f: dit_file(f, lambda s: s.update({Q: s[Q].to(torch.float8_e4m3fn)})), "stored as F8_E4M3"),
    "half a prefix": (lambda f: dit_file(f, lambda s: s.update({f"diffusion_model.{Q}": s.pop(Q)})), "none of the"),
    "a LoRA": (lambda f: dit_file(f, lambda s: s.update({"a.lora_A.weight": torch.ones(1)})), "LoRA adapters"),
    "an image to video DiT": (
        lambda f: dit_file(f, lambda s: s.update({PATCH_KEY: torch.ones(128, 36, 1, 2, 2)})),
        "36 input channels: Wan's image-to-video model",
    ),
    "code in a pickle": (harmful, "could execute code"),
    "no VAE": (lambda f: without(f, VAE.file), "Wan2.1_VAE.pth is missing"),
    "no tokenizer": (lambda f: without(f, "google/umt5-xxl/tokenizer.json"), "tokenizer.json is missing"),
    "no shard": (lambda f: without(f, f"{STEM}-00002-of-00002.safetensors"), "download that shard again"),
    "two experts": (lambda f: experts(f, named="high_noise_model"), "two experts"),
    "two experts of diffusers": (lambda f: experts(f, named="transformer_2"), "two experts"),
    "the diffusers layout": (lambda f: experts(f, named="transformer"), "in the diffusers layout already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(case: str, originals: Path, tmp_path: Path) -> None:
    make, said = REFUSED[case]
    source, out = make(Path(shutil.copytree(originals, tmp_path / "source" / "wan"))), tmp_path / "out" / "wan"
    with pytest.raises(UserError) as refused:
        import_wan(source, out)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not list(out.parent.iterdir()) if out.parent.exists() else case == "nothing"
    assert not Path("harm").exists()


def test_a_folder_that_is_there_stays(originals: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already there"):
        import_wan(originals, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_one_file_in_place_of_a_folder_is_told(originals: Path) -> None:
    with pytest.raises(UserError, match="flowmask import wan FILE OUT"):
        WanFolder(originals / VAE.file)
