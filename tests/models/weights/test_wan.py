"""A Wan2.1 folder opens strictly: complete, or refused in one line with the mistake and its place."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowmask.models import strict
from flowmask.models.dit import PATCH_KEY
from flowmask.models.errors import WeightsError
from flowmask.models.weights.wan import WanFolder

GOLDEN = Path(__file__).parents[2] / "golden" / "parity"
DIT = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "text_dim": 24, "freq_dim": 32}
VAE = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint as diffusers writes it, with the DiT in shards."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    root = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    WanTransformer3DModel(**DIT, ffn_dim=48).save_pretrained(root / "transformer", max_shard_size="40KB")
    AutoencoderKLWan(**VAE).save_pretrained(root / "vae")
    shutil.copytree(GOLDEN / "text" / "encoder", root / "text_encoder")
    shutil.copytree(GOLDEN / "text" / "tokenizer", root / "tokenizer")
    return root


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "wan"))


def refusal(load: object) -> str:
    with pytest.raises(WeightsError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "transformer").glob("*.safetensors"))


def test_sharded_weights_load_with_every_value(folder: Path) -> None:
    assert len(shards(folder)) > 1 and (folder / "transformer" / f"{STEM}.safetensors.index.json").is_file()
    ours = WanFolder(folder).transformer(video_injection=False)
    stored = {key: value for file in shards(folder) for key, value in load_file(file).items()}
    assert ours.state_dict().keys() == stored.keys()
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in stored.items())
    assert all(p.requires_grad and not p.is_meta for p in ours.parameters())


def test_widening_copies_the_weights_and_zeroes_the_new_channels(folder: Path) -> None:
    plain = WanFolder(folder).transformer(video_injection=False).state_dict()
    wide = WanFolder(folder).transformer(video_injection=True)
    weight = wide.state_dict()[PATCH_KEY]
    assert torch.equal(weight[:, :16], plain[PATCH_KEY]) and not weight[:, 16:].any()
    assert wide.config.in_channels == wide.patch_embedding.in_channels == 32 and wide.config.out_channels == 16
    assert all(torch.equal(v, plain[k]) for k, v in wide.state_dict().items() if k != PATCH_KEY)


def test_32_input_channels_are_told_by_the_weights_not_by_the_config(folder: Path) -> None:
    wide = WanFolder(folder).transformer(video_injection=True)
    with torch.no_grad():
        wide.patch_embedding.weight[:, 16:] = 0.5
    shutil.rmtree(folder / "transformer")
    wide.save_pretrained(folder / "transformer")
    edit(folder / "transformer" / "config.json", in_channels=16)
    again = WanFolder(folder).transformer(video_injection=True)
    assert torch.equal(again.patch_embedding.weight, wide.patch_embedding.weight)
    assert "video_injection=true" in refusal(lambda: WanFolder(folder).transformer(video_injection=False))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_weights_of_either_dtype_load_as_either(folder: Path, stored: torch.dtype, asked: torch.dtype) -> None:
    for file in [*shards(folder), *(folder / "vae").glob("*.safetensors"), folder / "text_encoder/model.safetensors"]:
        save_file({k: v.to(stored) for k, v in load_file(file).items()}, file)
    wan = WanFolder(folder)
    models = (wan.transformer(video_injection=True, dtype=asked), wan.vae(asked), wan.text_encoder(asked).model)
    for model in models:
        assert {p.dtype for p in model.parameters()} == {asked}
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert models[0].rope.freqs_cos.dtype == torch.float32


def test_the_token_table_may_have_either_name_or_both_but_not_two_values(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    want = WanFolder(folder).text_encoder(torch.float32)("a red dog", max_tokens=64)
    table = state.pop("shared.weight")
    for names in (["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]):
        save_file({**state, **{name: table.clone() for name in names}}, file)
        assert torch.equal(WanFolder(folder).text_encoder(torch.float32)("a red dog", max_tokens=64), want)
    save_file({**state, "shared.weight": table, "encoder.embed_tokens.weight": table + 1}, file)
    assert "two different tables" in refusal(lambda: WanFolder(folder).text_encoder(torch.float32))
    save_file(state, file)
    assert "shared.weight" in refusal(lambda: WanFolder(folder).text_encoder(torch.float32))


def load_all(folder: Path) -> None:
    wan = WanFolder(folder)
    wan.transformer(video_injection=True)
    wan.vae()
    wan.text_encoder(torch.float32)


def rewrite(file: Path, **changed: torch.Tensor | None) -> None:
    state = {**load_file(file), **changed}
    save_file({key: value for key, value in state.items() if value is not None}, file)


VAE_FILE = f"vae/{STEM}.safetensors"
DAMAGES = {
    "no folder": (lambda f: shutil.rmtree(f), "is not a folder"),
    "no transformer": (lambda f: shutil.rmtree(f / "transformer"), "transformer is missing"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "vae is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer is missing"),
    "no tokenizer.json": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no config": (lambda f: (f / "vae/config.json").unlink(), "config.json is missing"),
    "broken config": (lambda f: (f / "vae/config.json").write_text("{"), "is not JSON"),
    "config of another class": (
        lambda f: edit(f / "transformer/config.json", _class_name="UNet"),
        "is for UNet, not WanTransformer3DModel",
    ),
    "config with an unknown key": (lambda f: edit(f / "vae/config.json", zdim=16), "has zdim, unknown"),
    "wan 2.2 vae": (lambda f: edit(f / "vae/config.json", z_dim=48), "not a Wan2.1 VAE (z_dim 48)"),
    "impossible config": (lambda f: edit(f / "transformer/config.json", num_layers="two"), "cannot be built"),
    "text config of another model": (lambda f: edit(f / "text_encoder/config.json", model_type="t5"), "not umt5"),
    "no shard": (lambda f: shards(f)[1].unlink(), "download that shard again"),
    "no weights": (lambda f: (f / VAE_FILE).unlink(), f"{STEM}.safetensors is missing"),
    "cut shard": (lambda f: shards(f)[0].write_bytes(shards(f)[0].read_bytes()[:-100]), "is damaged"),
    "empty shard": (lambda f: shards(f)[0].write_bytes(b""), "is damaged"),
    "only a pickle": (
        lambda f: (f / VAE_FILE).rename(f / "vae" / f"{STEM}.bin"),
        f"pickled weights ({STEM}.bin), which are refused",
    ),
    "missing key": (lambda f: rewrite(f / VAE_FILE, **{"quant_conv.bias": None}), "1 missing (quant_conv.bias)"),
    "unexpected key": (lambda f: rewrite(f / VAE_FILE, extra=torch.ones(1)), "1 unexpected (extra)"),
    "reshaped key": (
        lambda f: rewrite(f / VAE_FILE, **{"quant_conv.bias": torch.ones(3)}),
        "1 reshaped (quant_conv.bias (3,) not (32,))",
    ),
    "many missing keys": (
        lambda f: rewrite(f / VAE_FILE, **{k: None for k in load_file(f / VAE_FILE) if "encoder" in k}),
        ", ...)",
    ),
    "integer weights": (
        lambda f: rewrite(f / VAE_FILE, **{"quant_conv.bias": torch.ones(32, dtype=torch.int8)}),
        "stored as I8",
    ),
    "index promises more": (
        lambda f: rewrite(shards(f)[0], **{next(iter(load_file(shards(f)[0]))): None}),
        "promises 1 tensors that its shards lack",
    ),
    "shard repeats a key": (
        lambda f: rewrite(shards(f)[1], **dict([next(iter(load_file(shards(f)[0]).items()))])),
        "repeats",
    ),
    "index points elsewhere": (
        lambda f: edit(f / "transformer" / f"{STEM}.safetensors.index.json", weight_map={"a": "../x.safetensors"}),
        "names '../x.safetensors'",
    ),
    "index without a map": (
        lambda f: edit(f / "transformer" / f"{STEM}.safetensors.index.json", weight_map={}),
        "has no weight_map",
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").write_text("{}"), "cannot be built"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_not_whole_is_refused_in_one_line_that_names_it(damage: str, folder: Path) -> None:
    change, said = DAMAGES[damage]
    change(folder)
    message = refusal(lambda: load_all(folder))
    assert said in message and str(folder) in message


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] += [[f"word{i}", -20.0] for i in range(50)]
    file.write_text(json.dumps(content))
    assert "they are of two models" in refusal(lambda: WanFolder(folder).text_encoder(torch.float32))


def test_identity_follows_the_content_and_not_the_path(folder: Path, pristine: Path) -> None:
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    before = {part: WanFolder(pristine).identity(part) for part in parts}
    edit(folder / "vae" / "config.json", _name_or_path="/elsewhere", _diffusers_version="9")
    assert {part: WanFolder(folder).identity(part) for part in parts} == before
    assert len(set(before.values())) == len(parts)
    edit(folder / "vae" / "config.json", latents_mean=[0.0] * 16)
    assert WanFolder(folder).identity("vae") != before["vae"]
    state = load_file(shards(folder)[0])
    next(iter(state.values())).view(-1)[0] += 1
    save_file(state, shards(folder)[0])
    assert WanFolder(folder).identity("transformer") != before["transformer"]
    assert "no part" in refusal(lambda: WanFolder(folder).identity("decoder"))


def test_a_file_that_memory_does_not_hold_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 57155399696 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(strict, "safe_open", full)
    assert "does not fit into memory" in refusal(lambda: WanFolder(folder).vae())
