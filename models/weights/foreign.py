"""Weights that look like ours and are not: told by names, shapes and the index of their folder, never by a file's name.

Each gets one line that says what it is. What is merely damaged, or quite another thing, is left to the strict checks.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowmask.models.errors import WeightsError
from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import parse_json

_OURS = (16, 32)  # input channels of the DiT, without and with the video injected
_OTHERS = {36: "Wan's image-to-video model", 48: "Wan2.2 TI2V-5B or a control model"}
_MARKS = {  # parts of names that no DiT of ours has
    "vace_": "Wan VACE",
    "image_embedder.": "Wan's image-to-video model",
    "add_k_proj.": "Wan's image-to-video model",
    "img_emb.": "Wan's image-to-video model",
    "motion_encoder.": "Wan Animate",
    "lora_": "LoRA adapters of another project",
}
_ORIGINAL = "self_attn.q.weight"  # Wan's own code calls diffusers' attn1.to_q so
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_MOST_JSON = 1 << 20
_DIFFUSERS = "give the weights by diffusers' names (a folder whose name ends in -Diffusers has them)"
_T2V = "FlowMask takes DiTs of Wan2.1 text-to-video, with 16 or 32 input channels"


def refuse_foreign(shapes: Mapping[str, Iterable[int]], *, where: object) -> None:
    """WeightsError in one line if tensors of these names and shapes are a DiT of another kind or packing."""
    from flowmask.models.dit import PATCH_KEY

    for mark, kind in _MARKS.items():
        if found := next((name for name in shapes if mark in name), None):
            raise WeightsError(f"{where} is {kind} (it has {found[:100]}); {_T2V}")
    if found := next((name for name in shapes if name.startswith(_PREFIXES)), None):
        raise WeightsError(f"{where} is packed as ComfyUI does ({found[:100]}); {_DIFFUSERS}")
    if found := next((name for name in shapes if name.endswith(_ORIGINAL)), None):
        raise WeightsError(f"{where} has the names of Wan's original files ({found[:100]}); {_DIFFUSERS}")
    patch = tuple(shapes.get(PATCH_KEY, ()))
    if len(patch) == 5:
        refuse_channels(patch[1], where=where)


def refuse_channels(channels: object, *, where: object) -> None:
    """WeightsError if a DiT of so many input channels is none of ours."""
    if isinstance(channels, int) and channels not in _OURS:
        kind = _OTHERS.get(channels, "a DiT of another project")
        raise WeightsError(f"{where} takes {channels} input channels: {kind}; {_T2V}")


def refuse_foreign_folder(path: Path) -> None:
    """WeightsError in one line if a folder is of two experts (Wan2.2), or in the layout of Wan's original files."""
    index = _object(path / "model_index.json")
    second = index.get("transformer_2")
    experts = index.get("boundary_ratio") is not None or (isinstance(second, list) and any(second))
    if experts or (path / "transformer_2").is_dir() or (path / "high_noise_model").is_dir():
        raise WeightsError(f"{path} has two experts, as Wan2.2 A14B; {_T2V}")
    if _object(path / "config.json").get("_class_name") == "WanModel":
        raise WeightsError(f"{path} has the layout of Wan's original files; give the folder in the diffusers layout")


def _object(file: Path) -> dict[str, Any]:
    """What a small JSON file says; nothing if there is none, or if it is no object: others judge that."""
    try:
        value = parse_json(read_regular(file, limit=_MOST_JSON))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
