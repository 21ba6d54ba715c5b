"""DiTs of other projects and folders of two experts are refused in one line each, and never taken for ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowmask.models.dit import PATCH_KEY
from flowmask.models.errors import WeightsError
from flowmask.models.weights.foreign import refuse_foreign
from flowmask.models.weights.tiny_wan import write_tiny_wan
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.weights import load_dit

GOLDEN = Path(__file__).parents[2] / "golden" / "parity"
STEM = "diffusion_pytorch_model.safetensors"


def ours(case: str = "dit_dvi") -> dict[str, Tensor]:
    return load_file(GOLDEN / case / "weights.safetensors")


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with some of its names as in Wan's own code."""
    ends = {"attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn2.to_q": "cross_attn.q"}
    renamed = {}
    for name, tensor in state.items():
        for here, there in ends.items():
            name = name.replace(here, there)
        renamed[name] = tensor
    return renamed


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}


def channels(count: int) -> dict[str, Tensor]:
    state = ours()
    return {**state, PATCH_KEY: torch.zeros(len(state[PATCH_KEY]), count, 1, 2, 2)}


FOREIGN = {
    "original names": (lambda: original(ours("dit_plain")), "Wan's original files"),
    "ComfyUI": (lambda: prefixed(original(ours("dit_plain"))), "ComfyUI"),
    "image to video": (lambda: channels(36), "36 input channels: Wan's image-to-video model"),
    "48 channels": (lambda: channels(48), "48 input channels: Wan2.2 TI2V-5B"),
    "any other number": (lambda: channels(20), "20 input channels: a DiT of another project"),
    "VACE": (lambda: {**ours(), "vace_blocks.0.proj_in.weight": torch.ones(2)}, "Wan VACE"),
    "image embedder": (
        lambda: {**ours(), "condition_embedder.image_embedder.norm1.bias": torch.ones(2)},
        "image-to-video",
    ),
    "LoRA": (lambda: {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)}, "LoRA adapters"),
}


@pytest.mark.parametrize("form", ["raw", "trained", "safetensors", "folder"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_dit_of_another_kind_is_told_in_one_line_whatever_holds_it(kind: str, form: str, tmp_path: Path) -> None:
    make, said = FOREIGN[kind]
    state, source = make(), tmp_path / "dit.pth"
    if form == "raw":
        torch.save(state, source)
    elif form == "trained":
        torch.save({"model": state, "ema_model": {"shadow_params": list(state.values())}}, source)
    elif form == "safetensors":
        save_file(state, source := tmp_path / "dit.safetensors")
    else:
        source = tmp_path / "export"
        (source / "transformer").mkdir(parents=True)
        save_file(state, source / "transformer" / STEM)
    with pytest.raises(WeightsError) as raised:
        load_dit(str(source))
    assert said in str(raised.value) and str(source) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("case", ["dit_dvi", "dit_plain"])
def test_ours_are_told_from_all_of_them(case: str) -> None:
    refuse_foreign({name: tensor.shape for name, tensor in ours(case).items()}, where="ours")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "wan"
    write_tiny_wan(folder)
    return folder


INDICES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a boundary": ("model_index.json", {"boundary_ratio": 0.875}, "two experts"),
    "a second DiT": ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "two experts"),
    "the original": ("config.json", {"_class_name": "WanModel"}, "the layout of Wan's original files"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_a_folder_is_told_by_its_index_as_a_base_and_as_weights(kind: str, wan: Path, tmp_path: Path) -> None:
    name, said, message = INDICES[kind]
    folder = shutil.copytree(wan, tmp_path / "other")
    known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps({**known, **said}))
    for load in (lambda: WanFolder(folder), lambda: load_dit(str(folder))):
        with pytest.raises(WeightsError, match=message) as raised:
            load()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "index", [{"boundary_ratio": None, "transformer_2": [None, None], "expand_timesteps": False}, None, [], "{"]
)
def test_a_folder_of_one_expert_opens_whatever_else_its_index_says(index: Any, wan: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(wan, tmp_path / "wan")
    (folder / "model_index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    WanFolder(folder).empty_transformer(video_injection=True)


def test_a_config_of_other_channels_is_told_before_any_tensor_is_read(wan: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(wan, tmp_path / "wan")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 36}))
    with pytest.raises(WeightsError, match="image-to-video"):
        WanFolder(folder).empty_transformer(video_injection=True)
