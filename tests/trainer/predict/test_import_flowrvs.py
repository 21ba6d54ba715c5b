"""An import segments as its files do, remembers their conventions, and needs nothing but Wan2.1."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_export import write_published
from torch import Tensor

from flowmask.models.config import AskedConventions, SamplerConfig
from flowmask.models.errors import ConfigError, WeightsError
from flowmask.models.vae import latent_frames
from flowmask.trainer.predict.conventions import PUBLISHED
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.import_flowrvs import import_flowrvs
from flowmask.trainer.predict.inference import load_segmenter
from flowmask.trainer.predict.weights import load_dit, own_encoder

OTHER: dict[str, Any] = {"pixel_norm": "imagenet", "text_tokens": 64, "mask_latent_norm": "video", "lowercase": False}
NONE = AskedConventions()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wan, dit.pth and decoder.pth; the encoder of decoder.pth differs from that of wan."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("golden")
    write_published(folder)
    return folder


def logits(checkpoint: Path, files: Path, said: list[str], **options: Any) -> Tensor:
    """The logits for a clip and a sentence with capital letters."""
    loaded = load_segmenter(
        str(checkpoint),
        wan=files / "wan",
        sampler=SamplerConfig(),
        precision="fp32",
        encoder_precision="fp32",
        device="cpu",
        say=said.append,
        **options,
    )
    clip = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return next(loaded.logits(loaded.segmenter.encode_video(latent_frames(clip)), ["The Dog"]))


@pytest.mark.parametrize("configs", [False, True])
@pytest.mark.parametrize("asked", [{}, OTHER])
def test_an_import_segments_to_the_bit_as_its_files_with_the_same_conventions(
    files: Path, tmp_path: Path, asked: dict[str, Any], configs: bool
) -> None:
    wanted, said = AskedConventions.model_validate(asked), []
    out, wan = tmp_path / "out", files / "wan" if configs else None
    done = import_flowrvs(
        files / "dit.pth", decoder=files / "decoder.pth", out=out, conventions=wanted, wan=wan, say=said.append
    )
    assert len(said) == (1 if asked else 2) and "averaged" in said[0]
    settings = load_dit(str(out)).settings
    assert {name: settings[name] for name in PUBLISHED} == {**PUBLISHED, **asked}
    assert done.sha256 == load_dit(str(files / "dit.pth"), ema=False).sha256
    expected = logits(files / "dit.pth", files, [], mask_decoder=str(files / "decoder.pth"), conventions=wanted)
    assert torch.equal(logits(out, files, known := []), expected) and not known
    for part in ("transformer", "mask_decoder"):
        assert (out / part / "config.json").is_file() == configs


def test_an_export_keeps_the_encoder_that_the_mask_decoder_brought(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_flowrvs(files / "dit.pth", decoder=files / "decoder.pth", out=out, conventions=NONE)
    again = export(str(out), format="diffusers", out=tmp_path / "again", wan=files / "wan").path
    brought = own_encoder(str(files / "decoder.pth"))
    for place in (out, again):
        kept = own_encoder(str(place))
        assert brought.keys() == kept.keys() and all(torch.equal(kept[name], brought[name]) for name in kept)
    assert torch.equal(logits(again, files, []), logits(out, files, []))


def test_an_encoder_that_has_changed_since_is_refused(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_flowrvs(files / "dit.pth", decoder=files / "decoder.pth", out=out, conventions=NONE)
    held = out / "mask_decoder" / "diffusion_pytorch_model.safetensors"
    content, one = held.read_bytes(), next(iter(own_encoder(str(out)).values())).numpy().tobytes()
    place = content.index(one)
    held.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(WeightsError, match="its encoder differs from the exported one"):
        own_encoder(str(out))


def test_what_can_not_be_imported_is_one_line_and_nothing_is_written(files: Path, tmp_path: Path) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    there.mkdir()
    told = import_flowrvs(files / "dit.pth", decoder=None, out=tmp_path / "told", conventions=NONE).path
    wrong = AskedConventions(text_tokens=64)
    for dit, decoder, target, asked, message in [
        (files / "none.pth", None, out, NONE, "does not exist"),
        (files / "dit.pth", files / "none.pth", out, NONE, "does not exist"),
        (files / "dit.pth", files / "dit.pth", out, NONE, "keys that a VAE does not have"),
        (files / "dit.pth", None, there, NONE, "already exists"),
        (told, None, out, wrong, "records its conventions"),
    ]:
        with pytest.raises((WeightsError, ConfigError), match=message) as raised:
            import_flowrvs(dit, decoder=decoder, out=target, conventions=asked)
        assert "\n" not in str(raised.value) and not out.exists() and not list(there.iterdir())
