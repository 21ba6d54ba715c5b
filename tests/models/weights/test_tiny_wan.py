"""The tiny Wan folder: the real layout, opened by the strict loader, with a VAE that reconstructs its input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowmask.models.errors import WeightsError
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.weights.tiny_wan import write_tiny_wan
from flowmask.models.weights.wan import WanFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny") / "wan"
    write_tiny_wan(made)
    return made


def discs() -> torch.Tensor:
    """Bool [2 5 64 64]: two discs that move apart."""
    grid = torch.arange(64.0)
    frames = []
    for centre in ((20.0, 1.0), (40.0, -2.0)):
        x = centre[0] + centre[1] * torch.arange(5.0)[:, None, None]
        frames.append((grid[None, None, :] - x) ** 2 + (grid[None, :, None] - 30) ** 2 < 100)
    return torch.stack(frames)


def test_the_strict_loader_opens_every_part_and_the_transformer_is_sharded(folder: Path) -> None:
    wan = WanFolder(folder)
    assert wan.transformer(video_injection=True).patch_embedding.weight.shape[1] == 32
    assert wan.transformer(video_injection=False).patch_embedding.weight.shape[1] == 16
    encoder = wan.text_encoder()
    assert encoder("the red circle", max_tokens=32).shape[1] == wan.transformer(video_injection=False).config.text_dim
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["flow_shift"] == 3.0


def test_the_same_seed_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    write_tiny_wan(tmp_path / "same")
    write_tiny_wan(tmp_path / "other", seed=1, random_vae=True)
    same, other, first = (WanFolder(path) for path in (tmp_path / "same", tmp_path / "other", folder))
    for part in ("transformer", "text_encoder", "tokenizer", "vae"):
        assert same.identity(part) == first.identity(part)
        assert (other.identity(part) == first.identity(part)) is (part == "tokenizer")


def test_the_text_encoder_is_written_as_transformers_would(folder: Path, tmp_path: Path) -> None:
    WanFolder(folder).text_encoder().model.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / "text_encoder" / name).read_bytes()


def test_writing_it_imports_no_deepspeed_which_would_warn_where_there_is_no_gpu(tmp_path: Path) -> None:
    words = "import sys, pathlib; from flowmask.models.weights.tiny_wan import write_tiny_wan"
    words += "; write_tiny_wan(pathlib.Path(sys.argv[1])); assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", words, str(tmp_path / "wan")], check=True)


def test_any_text_becomes_tokens_and_comes_back(folder: Path) -> None:
    tokenizer = WanFolder(folder).text_encoder().tokenizer
    for text in ("the red circle moving left", "Übergrößen, 3 Zebras ✓!", "a b", "~^`{}"):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1 and 3 not in ids and 0 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("the purple triangles that stay still")["input_ids"]) == 7


def test_embeddings_have_unit_scale_and_tell_words_and_their_order_apart(folder: Path) -> None:
    encode = WanFolder(folder).text_encoder()
    base, word, order = (
        encode(text, max_tokens=32)
        for text in ("the red circle moving left", "the red circle moving right", "the circle red moving left")
    )
    assert 0.8 < base.std() < 1.25
    for other in (word, order):
        assert (base - other).pow(2).mean().sqrt() > 0.2


@torch.no_grad()
def test_the_vae_keeps_masks_and_its_raw_latents_have_the_scale_of_wan(folder: Path) -> None:
    vae = WanFolder(folder).vae()
    mask = discs()
    signed = (mask[:, None].float() * 2 - 1).expand(-1, 3, -1, -1, -1)
    latent = vae._encode(signed)[:, :16]
    assert latent.shape == (2, 16, 2, 8, 8)
    assert 1 < latent.std() < 3
    decoded = MaskDecoder.from_vae(vae)(latent)[:, 0] > 0
    assert (decoded & mask).sum() / (decoded | mask).sum() > 0.8
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == 16
    assert all(0.3 < std < 3 for std in vae.config.latents_std)


@torch.no_grad()
def test_the_encoder_is_causal_and_a_clip_may_be_one_frame(folder: Path) -> None:
    vae = WanFolder(folder).vae()
    clip = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = vae._encode(clip)
    assert whole.shape == (1, 32, 3, 4, 6)
    torch.testing.assert_close(vae._encode(clip[:, :, :5]), whole[:, :, :2])
    torch.testing.assert_close(vae._encode(clip[:, :, :1]), whole[:, :, :1])


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(WeightsError, match="not an empty folder"):
        write_tiny_wan(tmp_path)
