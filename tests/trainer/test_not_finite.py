"""Numbers that are not finite are found when weights are read, saved, exported or started from, and are named."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import broken_cache, start
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowmask.models.errors import CacheError, CheckpointError, WeightsError
from flowmask.models.weights.flowrvs_write import write_mask_decoder
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.inference import mask_decoder_named
from flowmask.trainer.predict.weights import load_dit, load_mask_decoder
from flowmask.trainer.state import checkpoint_write
from flowmask.trainer.state.steps import complete

NAN, INF = float("nan"), float("inf")
LOADERS: dict[str, Any] = {
    "transformer": lambda wan, **given: wan.transformer(video_injection=True, **given),
    "vae": WanFolder.vae,
    "text_encoder": WanFolder.text_encoder,
}
BROKEN = r"{} .*has a number that is not finite; "


@pytest.fixture
def wan(lab: Path, tmp_path: Path) -> Path:
    return shutil.copytree(lab / "wan", tmp_path / "wan")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", LOADERS)
def test_a_weight_of_any_part_of_wan_is_refused_with_its_file_and_name(
    wan: Path, part: str, dtype: torch.dtype, value: float
) -> None:
    LOADERS[part](WanFolder(wan), dtype=dtype)
    (file,) = (wan / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=re.escape(f"{file}: {name} has a number that is not finite")):
        LOADERS[part](WanFolder(wan), dtype=dtype)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vae", "latents_std", "NaN"),
        ("vae", "latents_mean", "-Infinity"),
        ("vae", "latents_std", "0.0"),
        ("vae", "latents_mean", "1e999"),
        ("transformer", "eps", "NaN"),
        ("text_encoder", "layer_norm_epsilon", "1e400"),
    ],
)
def test_so_is_a_number_of_its_configs(wan: Path, part: str, key: str, value: str) -> None:
    file = wan / part / "config.json"
    config = json.loads(file.read_text())
    config[key] = [0.5] * 15 + ["?"] if key.startswith("latents") else "?"
    file.write_text(json.dumps(config).replace('"?"', value))
    with pytest.raises(WeightsError, match=re.escape(str(file))) as caught:
        LOADERS[part](WanFolder(wan))
    assert "\n" not in str(caught.value) and "finite" in str(caught.value)


def poisoned(lab: Path, out: Path, kind: str, overrides: dict[str, Any] | None = None) -> str:
    """A run of two steps whose last checkpoint has a NaN in each tensor of one kind, as earlier versions allowed."""

    def poison(tensors: Iterator[tuple[str, Tensor]], **_: Any) -> None:
        for name, tensor in tensors:
            if name.startswith(f"{kind} of "):
                tensor[0] = NAN

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_write, "refuse_not_finite", poison)
        assert start(lab, out, {"train.steps": 2, "checkpoint.every_steps": 1} | (overrides or {})) == 0
    return str(out)


def test_weights_of_a_run_that_are_not_finite_are_neither_exported_nor_started_from_nor_gone_on_with(
    lab: Path, tmp_path: Path
) -> None:
    run = poisoned(lab, tmp_path / "run", "ema")
    for format in ("diffusers", "flowrvs", "safetensors"):
        out = tmp_path / {"flowrvs": "out.pth", "safetensors": "out.safetensors"}.get(format, "out")
        with pytest.raises(WeightsError, match=BROKEN.format(f"{run}:")):
            export(run, format=format, out=out)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no partial file
    with pytest.raises(WeightsError, match=BROKEN.format(f"{run}:")):
        start(lab, tmp_path / "next", {"model.init": run})
    with pytest.raises(CheckpointError, match=BROKEN.format(".*step_00000002: ema of") + "move it away"):
        start(lab, Path(run), {"train.steps": 4})
    shutil.rmtree(Path(run, "checkpoints", "step_00000002"))
    with pytest.raises(CheckpointError, match="step_00000001"):
        start(lab, Path(run), {"train.steps": 4})
    assert load_dit(run, ema=False).state_dict


def test_nor_are_adapters_and_mask_decoders(lab: Path, tmp_path: Path) -> None:
    adapters = poisoned(lab, tmp_path / "lora", "ema", {"lora.rank": 2})
    for format in ("lora", "diffusers"):
        with pytest.raises(WeightsError, match=BROKEN.format(f"{adapters}:")):
            export(adapters, format=format, out=tmp_path / "out")
    decoder = poisoned(lab, tmp_path / "decoder", "ema", {"objective.kind": "mask_decoder"})
    with pytest.raises(WeightsError, match=BROKEN.format(f"{decoder}:")):
        load_mask_decoder(decoder)
    vae: Any = WanFolder(lab / "wan").vae()
    half = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        half[name] = half[name][:1]
    for name in ("encoder.conv_in.bias", "decoder.conv_in.bias"):
        with_nan = half | {name: torch.full_like(half[name], NAN)}
        write_mask_decoder(tmp_path / "d.pth", vae=with_nan, settings={})
        with pytest.raises(WeightsError, match=BROKEN.format("d.pth: " + re.escape(name))):
            mask_decoder_named(str(tmp_path / "d.pth"), vae)


def test_no_checkpoint_is_written_whose_numbers_are_not_finite(lab: Path, tmp_path: Path) -> None:
    steep = {"train.lr": 1e38, "train.warmup_steps": 3, "checkpoint.every_steps": 1, "train.steps": 6}
    said = r"the training: \w+ of .* not finite; start a new run with a lower train.lr; earlier checkpoints are kept"
    with pytest.raises(CheckpointError, match=said) as caught:
        start(lab, tmp_path / "run", steep | {"train.warmup_steps": 0})
    assert "\n" not in str(caught.value)
    assert "the next save will retry" in (tmp_path / "run" / "log.txt").read_text()
    assert not any(complete(tmp_path / "run" / "checkpoints"))


def test_latents_of_an_evaluation_are_checked_before_the_training_starts(lab: Path, tmp_path: Path) -> None:
    cache = broken_cache(lab, tmp_path / "cache", examples=[3])
    often = {"evaluate.every_steps": 2, "evaluate.cache": str(cache), "evaluate.examples": 16}
    with pytest.raises(
        CacheError, match=rf"latents of example \d not finite; check what is read: flowmask cache verify {cache}"
    ):
        start(lab, tmp_path / "run", often)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
