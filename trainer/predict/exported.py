"""Reads exports: a folder of parts, or one .safetensors file (from other projects only a state dict)."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flowmask.models.dit import LATENT_CHANNELS, PATCH_KEY
from flowmask.models.errors import WeightsError
from flowmask.models.stored.regular import open_regular
from flowmask.models.stored.sealed import SEAL, parse_json
from flowmask.models.strict import SafetensorsFolder, exported_settings, opened, read_json
from flowmask.models.weights.flowrvs import SETTINGS, refuse_renamed_settings
from flowmask.models.weights.foreign import refuse_foreign_folder, what_is
from flowmask.trainer.predict.parts import DIT, ENCODER, MASK_DECODER, PARTS, VIDEO_DIT, Part, State
from flowmask.trainer.state.run_folder import CHECKPOINTS

EXPORT_SETTINGS = "flowmask.json"
OWN_ENCODER = "own_encoder"  # hash of the encoder stored with a mask decoder, which was trained with it
EXPORT_STEM = "diffusion_pytorch_model"
_TEXT_ENCODER = "text_encoder"  # in a Wan2.1 folder but not in an export
_GIVE = {
    DIT.name: "give a run that trained the DiT, an export of it or a FlowRVS .pth file",
    MASK_DECODER.name: "give a run that trained a mask decoder, an export of it, a FlowRVS .pth file or 'vae'",
    VIDEO_DIT.name: "give a run that trained text to video",
}


def from_folder(path: Path, part: Part) -> tuple[State, dict[str, Any]]:
    """The weights of a part as fp32, and the settings that the export records."""
    refuse_foreign_folder(path)
    folder = path / part.folder
    if not folder.is_dir():
        raise WeightsError(f"{path} is {_instead(path, part)}; {_GIVE[part.name]}")
    with SafetensorsFolder(folder, EXPORT_STEM) as weights:
        _refuse_base(path, weights.shapes())
        kept = [key for key in weights.shapes() if not key.startswith(ENCODER)]
        state = {key: weights.tensor(key, torch.float32) for key in kept}
    return state, export_settings(path)


def _instead(path: Path, part: Part) -> str:
    """Describes a folder that lacks this part."""
    if other := next((other for other in PARTS.values() if (path / other.folder).is_dir()), None):
        plain = (path / _TEXT_ENCODER).is_dir()
        return f"{'a Wan2.1 folder' if plain else f'an export of {other.name}'}, without a {part.folder}/"
    if told := what_is(path):
        return f"{told}, from which alone no {part.name} can be loaded"
    return f"neither a run folder (no {CHECKPOINTS}/) nor an export (no {part.folder}/)"


def _refuse_base(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises WeightsError for the published Wan2.1: its DiT was not trained to segment."""
    plain = tuple(shapes.get(PATCH_KEY, ()))[1:2] == (LATENT_CHANNELS,)
    if plain and (path / _TEXT_ENCODER).is_dir() and not (path / EXPORT_SETTINGS).exists():
        raise WeightsError(
            f"{path} is a Wan2.1 folder, whose DiT was not trained to segment: use it as model.wan (--wan); "
            f"{_GIVE[DIT.name]}"
        )


def export_settings(path: Path) -> dict[str, Any]:
    """The settings in an export's own file; its mask decoder is the one in the same folder."""
    file = path / EXPORT_SETTINGS
    settings = exported_settings(read_json(file) if file.exists() else {}, where=file)
    if all((path / part.folder).is_dir() for part in (DIT, MASK_DECODER)):
        settings[MASK_DECODER.name] = str(path)
    return settings


def from_safetensors(path: Path) -> tuple[State, dict[str, Any]]:
    """One file of weights with its settings in its header."""
    with _opened(path) as file:
        return {name: file.get_tensor(key).float() for name, key in _names(file, encoder=False).items()}, header(path)


def encoder_in(path: Path) -> State:
    """The encoder used in the training of a mask decoder, fp32; empty for exports of FlowMask's own runs.

    Their folders also hold the Wan folder's encoder, in the dtype of the export; the Wan folder's own is used.
    """
    if path.suffix == ".safetensors" and path.is_file():
        with _opened(path) as file:
            return {name: file.get_tensor(key).float() for name, key in _names(file, encoder=True).items()}
    if not path.is_dir() or not export_settings(path).get(OWN_ENCODER):
        return {}
    with SafetensorsFolder(path / MASK_DECODER.folder, EXPORT_STEM) as weights:
        return {key: weights.tensor(key, torch.float32) for key in weights.shapes() if key.startswith(ENCODER)}


def _names(file: Any, *, encoder: bool) -> dict[str, str]:
    """Names of tensors, those of an encoder or all others, with their keys in the file."""
    names = {key.removeprefix("vae."): key for key in file.keys()}  # noqa: SIM118
    return {name: key for name, key in names.items() if name.startswith(ENCODER) == encoder}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An opened .safetensors file; raises WeightsError if it is damaged."""
    try:
        os.close(open_regular(path))
        with opened(path) as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({' '.join(str(error).split())}); get it again") from None


def header(path: Path) -> dict[str, Any]:
    """The settings in the header of FlowMask's .safetensors file."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
        refuse_renamed_settings((name for name, value in metadata.items() if f'"{SEAL}":' in value), where=path)
        return exported_settings(parse_json(metadata.get(SETTINGS, "{}")), where=path)
