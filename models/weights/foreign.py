"""Recognises weights that only look right, by names, shapes and the index of their folder, never by a file's name.

Each kind gets one line with its name. So does a folder without trained weights, by its mark, its config or its
files. Damaged files are left to the strict checks.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowmask.models.errors import WeightsError
from flowmask.models.files import MARK
from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import parse_json

_OURS = (16, 32)  # input channels of the DiT, without and with the video injected
_OTHERS = {36: "Wan's image-to-video model", 48: "Wan2.2 TI2V-5B or a control model"}
_MARKS = {  # parts of names that FlowMask's DiTs never have
    "vace_": "Wan VACE",
    "image_embedder.": "Wan's image-to-video model",
    "add_k_proj.": "Wan's image-to-video model",
    "img_emb.": "Wan's image-to-video model",
    "motion_encoder.": "Wan Animate",
    "lora_": "LoRA adapters of another project",
    "decoder.conv_in.": "a VAE or a mask decoder",
    "encoder.block.": "a text encoder",
}
_CONFIGS = {  # by the model's class in a config.json
    "AutoencoderKLWan": "the VAE of a Wan2.1 folder",
    "UMT5EncoderModel": "the text encoder of a Wan2.1 folder",
    "WanTransformer3DModel": "the transformer/ of a Wan2.1 folder or an export",
}
_FILES = {  # of folders without a mark; the first match counts
    "scores.json": "an evaluation",
    "predictions.json": "a folder of predictions",
    "manifest.json": "a cache",
    "tokenizer_config.json": "the tokenizer of a Wan2.1 folder",
    "text_encoder": "a Wan2.1 folder",
    "checkpoints": "a run",
    **dict.fromkeys(("JPEGImages", "Annotations", "meta_expressions", "meta_expressions.json"), "a dataset"),
    **dict.fromkeys(("*/JPEGImages", "*/Annotations", "*/meta_expressions.json"), "a dataset"),
}
_ORIGINAL = "self_attn.q.weight"  # the name of diffusers' attn1.to_q in Wan's own code
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # ComfyUI's, before every name
_ORIGINAL_FILES = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")
_MOST_JSON = 1 << 20
_CONVERT = "convert them (flowmask import wan SOURCE OUT), or take the folder whose name ends in -Diffusers"
_T2V = "FlowMask takes DiTs of Wan2.1 text-to-video, with 16 or 32 input channels"


def refuse_foreign(shapes: Mapping[str, Iterable[int]], *, where: object) -> None:
    """WeightsError in one line if tensors of these names and shapes are a DiT of another kind or packing."""
    refuse_other_kinds(shapes, where=where)
    if found := next((name for name in shapes if name.startswith(PREFIXES)), None):
        raise WeightsError(f"{where} is packed as ComfyUI does ({found[:100]}); {_CONVERT}")
    if found := next((name for name in shapes if name.endswith(_ORIGINAL)), None):
        raise WeightsError(f"{where} has the names of Wan's original files ({found[:100]}); {_CONVERT}")


def refuse_other_kinds(shapes: Mapping[str, Iterable[int]], *, where: object) -> None:
    """WeightsError in one line if a DiT is not one of Wan2.1 text-to-video, for any naming."""
    from flowmask.models.dit import PATCH_KEY

    for mark, kind in _MARKS.items():
        if found := next((name for name in shapes if mark in name), None):
            raise WeightsError(f"{where} is {kind} (it has {found[:100]}); {_T2V}")
    patch = next((shape for name, shape in shapes.items() if name.removeprefix(_prefix(name)) == PATCH_KEY), ())
    if len(channels := tuple(patch)) == 5:
        refuse_channels(channels[1], where=where)


def _prefix(name: str) -> str:
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")


def refuse_channels(channels: object, *, where: object) -> None:
    """WeightsError if a DiT with this number of input channels cannot be used here."""
    if isinstance(channels, int) and channels not in _OURS:
        kind = _OTHERS.get(channels, "a DiT of another project")
        raise WeightsError(f"{where} takes {channels} input channels: {kind}; {_T2V}")


def refuse_foreign_folder(path: Path) -> None:
    """WeightsError in one line if a folder has two experts (Wan2.2), or the layout of Wan's original files."""
    refuse_two_experts(path)
    named = _object(path / "config.json").get("_class_name") == "WanModel"
    if named or any((path / name).is_file() for name in _ORIGINAL_FILES):
        raise WeightsError(
            f"{path} has the layout of Wan's original files; convert it (flowmask import wan {path} OUT), or take the "
            "folder whose name ends in -Diffusers"
        )


def refuse_two_experts(path: Path) -> None:
    """WeightsError in one line if a folder is Wan2.2 A14B's, in either layout."""
    index = _object(path / "model_index.json")
    second = index.get("transformer_2")
    experts = index.get("boundary_ratio") is not None or (isinstance(second, list) and any(second))
    if experts or (path / "transformer_2").is_dir() or (path / "high_noise_model").is_dir():
        raise WeightsError(f"{path} has two experts, as Wan2.2 A14B; {_T2V}")


def what_is(path: Path) -> str | None:
    """The kind of a folder, with its article; None if unknown."""
    config = _object(path / "config.json")
    named = [_object(path / MARK).get("kind"), *map(_CONFIGS.get, _names(config))]
    told = next((name for name in named if isinstance(name, str) and name), None)
    return told[:60] if told else next((what for file, what in _FILES.items() if any(path.glob(file))), None)


def _names(config: Mapping[str, Any]) -> Iterator[str]:
    """The classes named in a config.json of diffusers or transformers."""
    several = config.get("architectures")
    for name in (config.get("_class_name"), *(several if isinstance(several, list) else ())):
        if isinstance(name, str):
            yield name


def _object(file: Path) -> dict[str, Any]:
    """The object in a small JSON file; empty if there is no file or no object: other checks refuse that."""
    try:
        value = parse_json(read_regular(file, limit=_MOST_JSON))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
