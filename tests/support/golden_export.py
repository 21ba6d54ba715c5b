"""The weights of the recorded evaluation as files: a Wan folder, an export of the DiT and a FlowRVS mask decoder."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PARITY = Path(__file__).parents[1] / "golden" / "parity"
DATA = PARITY / "e2e" / "data"
BOX = {"height_px": 32, "width_px": 48}


def write_golden_export(folder: Path) -> Path:
    """Write `folder`/{wan, decoder.pth, export} and return the export, which names the other two."""
    wan, export = folder / "wan", folder / "export"
    for part in ("transformer", "vae", "text_encoder", "scheduler"):
        (wan / part).mkdir(parents=True)
    _write_transformers(wan / "transformer", export / "transformer")
    _write_vae(wan / "vae", folder / "decoder.pth")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(PARITY / "text" / "encoder" / name, wan / "text_encoder" / name)
    shutil.copytree(PARITY / "text" / "tokenizer", wan / "tokenizer")
    tokens = load_file(PARITY / "text" / "io.safetensors")["input_ids"].shape[1]
    settings = {
        "wan": str(wan),
        "mask_decoder": str(folder / "decoder.pth"),
        "text_tokens": tokens,
        "lowercase": False,
        "short_side": BOX["height_px"],
        "long_side": BOX["width_px"],
    }
    (export / "flowmask.json").write_text(json.dumps(settings))
    return export


def write_published(folder: Path) -> Path:
    """`write_golden_export`, and `folder`/dit.pth: the trained DiT as a published file, which holds no conventions."""
    export = write_golden_export(folder)
    torch.save({"model": load_file(PARITY / "dit_dvi" / "weights.safetensors")}, folder / "dit.pth")
    return export


def _write_transformers(plain: Path, injected: Path) -> None:
    """Wan's own DiT, and the trained DiT that also takes the video."""
    config = json.loads((PARITY / "dit_dvi" / "config.json").read_text())
    known = {k: v for k, v in config.items() if k not in ("use_dvi", "patch_embedding_in_channels")}
    weights = load_file(PARITY / "dit_dvi" / "weights.safetensors")
    injected.mkdir(parents=True)
    save_file(weights, injected / "diffusion_pytorch_model.safetensors")
    (plain / "config.json").write_text(json.dumps(known))
    halved = {**weights, "patch_embedding.weight": weights["patch_embedding.weight"][:, :16].contiguous()}
    save_file(halved, plain / "diffusion_pytorch_model.safetensors")


def _write_vae(folder: Path, decoder: Path) -> None:
    """A random VAE of the recorded architecture; the real encoder and decoder are in the FlowRVS file."""
    from diffusers import AutoencoderKLWan

    config = json.loads((PARITY / "mask_decoder" / "config.json").read_text())
    torch.manual_seed(0)
    AutoencoderKLWan(**config).save_pretrained(folder)
    torch.save({"model": load_file(PARITY / "mask_decoder" / "weights.safetensors")}, decoder)
