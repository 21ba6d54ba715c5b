"""Trained weights by name: a run folder, an export (folder or .safetensors) or a FlowRVS .pth.

Each comes with the conventions of its training.

Recognises the kind of a source, and refuses weights whose conventions are not the requested ones. Whole
tensors in fp32 on the host; nothing here needs a process group or a GPU.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowmask.models.decoders.either import refuse_other_decoder
from flowmask.models.errors import WeightsError
from flowmask.models.lora import ADAPTER_CONFIG, frozen_part, merged
from flowmask.models.strict import load_strict, refuse_not_finite
from flowmask.models.weights import flowrvs
from flowmask.models.weights.flowrvs import NOT_AVERAGED
from flowmask.models.weights.foreign import refuse_foreign
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.adapters import Adapter, adapter_in_run, read_adapter, run_settings
from flowmask.trainer.predict.exported import (
    OWN_ENCODER,
    encoder_in,
    export_settings,
    from_folder,
    from_safetensors,
    header,
)
from flowmask.trainer.predict.parts import DIT, MASK_DECODER, PARTS, Part, State, part_trained, refuse_other_part
from flowmask.trainer.state.checkpoint import damage, read_full, read_run
from flowmask.trainer.state.document import Conventions, refuse_unlike
from flowmask.trainer.state.run_folder import CHECKPOINTS
from flowmask.trainer.state.steps import complete, is_run, newest

HOLDS = "holds"  # key: hashes of the weights in an export, as they are read
_NOT_FINITE = "take an earlier checkpoint of the run, or get the weights again"


@dataclass(frozen=True)
class LoadedWeights:
    """Weights and facts about them.

    state_dict: fp32 by name, of any shape    sha256: `content_sha256` of it
    settings:   the conventions that the weights need; a run's also name its `wan` folder and its `mask_decoder`
    last_only:  averaged weights were requested, but the file has none: these are the last ones
    """

    state_dict: dict[str, Tensor]
    settings: dict[str, Any]
    sha256: str
    last_only: bool = False


def load_dit(source: str, *, ema: bool = True, wan: Path | None = None) -> LoadedWeights:
    """A DiT's weights from a run (its newest complete checkpoint), one of its steps, an export or a .pth file.

    ema: the averaged weights if the source has both. wan: the Wan folder into which adapters are merged;
    default: that of their run. Raises UserError if something is missing, damaged or not the base.
    """
    return load(source, DIT, ema=ema, wan=wan)


def load_adapter(source: str, *, ema: bool = True) -> Adapter:
    """The trained weights of a LoRA run (or one of its steps, or an exported adapter), without its base."""
    path = Path(source)
    found = None
    if is_run(path):
        checkpoint, saved = _saved(path)
        found = adapter_in_run(checkpoint, saved, ema=ema)
    elif (path / ADAPTER_CONFIG).is_file():
        found = read_adapter(path, export_settings(path))
    if found is None:
        raise WeightsError(f"{source} has no LoRA adapters; export it in another format")
    refuse_not_finite(found.trained.items(), where=source, fix=_NOT_FINITE)
    if not is_run(path):
        return replace(found, settings=_judged(found.trained, found.settings, source).settings)
    return found


def load_mask_decoder(source: str, *, ema: bool = True) -> LoadedWeights:
    """A mask decoder's weights, of the VAE's or of a light one (`models/decoders/either.py`); else as `load_dit`."""
    return load(source, MASK_DECODER, ema=ema)


def start_from(
    source: str, module: nn.Module, *, ema: bool, settings: Mapping[str, Any], wan: Path | None = None
) -> dict[str, Any]:
    """Load trained weights into `module`; returns source, ema and sha256. WeightsError if `settings` disagree."""
    part = part_trained(settings)
    assert part is not None
    loaded = load(source, part, ema=ema, wan=wan)
    if loaded.last_only:  # the run's config must say which of the two it starts from
        raise WeightsError(f"model.init {source} has no EMA weights; set model.init_ema=false")
    if part is MASK_DECODER:
        refuse_other_decoder(loaded.state_dict, module, where=f"model.init {source}")
    differ = [
        f"{key} {loaded.settings[key]} there, {wanted} here"
        for key, wanted in settings.items()
        if key != "objective" and loaded.settings.get(key, wanted) != wanted
    ]
    if differ:
        raise WeightsError(f"model.init {source} was trained with other settings: {'; '.join(differ)}. Make them equal")
    load_strict(module, loaded.state_dict, where=source, fix="Use the model.wan of its training")
    return {"source": source, "ema": ema, "sha256": loaded.sha256}


def content_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and values of tensors of any shape; the format of their file does not matter."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(source: str, part: Part, *, ema: bool = True, wan: Path | None = None) -> LoadedWeights:
    """The weights of a part; sources and errors as for `load_dit`."""
    path = Path(source)
    if is_run(path):
        state, settings = _from_run(path, part, ema=ema, wan=wan)
    elif (path / ADAPTER_CONFIG).is_file() and part.takes_adapters:
        adapter = load_adapter(source)
        state, settings = with_base(adapter, wan=wan, where=source), adapter.settings
    elif path.is_dir():
        state, settings = from_folder(path, part)
    elif path.suffix == ".safetensors" and path.is_file():
        state, settings = from_safetensors(path)
        refuse_other_part(settings, part, where=path)
    elif path.is_file():
        state, settings = part.read_pth(path, ema=ema)
    else:
        raise WeightsError(f"{source} does not exist; give a run folder, an export or a FlowRVS .pth file")
    if part is DIT:
        refuse_foreign({name: tensor.shape for name, tensor in state.items()}, where=source)
    refuse_not_finite(state.items(), where=source, fix=_NOT_FINITE)
    return _judged(state, settings, source)


def _judged(state: State, settings: Mapping[str, Any], source: str) -> LoadedWeights:
    """Check that the settings are in range and that the weights match the hashes of an export (`holds`)."""
    refuse_unlike(Conventions, settings, where=f"{source}: its settings", error=WeightsError)
    sha256 = content_sha256(state)
    held = settings.get(HOLDS, [sha256])
    if not isinstance(held, list) or sha256 not in held:
        raise WeightsError(
            f"{source}: its weights differ from the exported ones: they are damaged or were changed; export it again"
        )
    known = {name: value for name, value in settings.items() if name not in (HOLDS, NOT_AVERAGED)}
    return LoadedWeights(state, known, sha256, last_only=NOT_AVERAGED in settings)


def own_encoder(source: str) -> State:
    """The encoder's half of the VAE (`encoder.*`, `quant_conv.*`) stored with a mask decoder; empty if it has none.

    The videos of its training were encoded with it, so it replaces the Wan folder's.
    """
    path = Path(source)
    found = flowrvs.load_encoder(path) if _is_pickle(path) else encoder_in(path)
    known = export_settings(path).get(OWN_ENCODER) if path.is_dir() else None
    if known not in (None, content_sha256(found)):
        raise WeightsError(f"{source}: its encoder differs from the exported one; export it again")
    refuse_not_finite(found.items(), where=source, fix="get the file again")
    return found


def part_of(source: str) -> Part:
    """The part that a source holds; WeightsError if it holds none."""
    path = Path(source)
    if is_run(path):
        return part_trained(_saved(path)[1]["settings"]) or DIT
    if path.is_dir():
        return next((part for part in PARTS.values() if (path / part.folder).is_dir()), DIT)
    problems = []
    for part in PARTS.values():
        try:
            load(source, part, ema=False)
        except WeightsError as error:
            problems.append(error)
        else:
            return part
    raise problems[0]


def _saved(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a run or of one of its steps, and its state."""
    checkpoint = newest_checkpoint(path)
    return checkpoint, read_run(checkpoint)["state"]


def _from_run(path: Path, part: Part, *, ema: bool, wan: Path | None) -> tuple[State, dict[str, Any]]:
    checkpoint, saved = _saved(path)
    refuse_other_part(saved["settings"], part, where=path)
    adapter = adapter_in_run(checkpoint, saved, ema=ema)
    if adapter is not None:
        return with_base(adapter, wan=wan, where=path), run_settings(saved)
    return read_full(checkpoint, kind="ema" if ema else "master"), run_settings(saved)


def with_base(adapter: Adapter, *, wan: Path | None, where: object) -> dict[str, Tensor]:
    """The whole DiT of adapters, of the base's shapes.

    Raises WeightsError if the base is not the one of their training.
    """
    base, named = _base(adapter, wan=wan, where=where)
    found = content_sha256(frozen_part(base, adapter.trained))
    known = adapter.frozen["sha256"]
    if found != known:
        raise WeightsError(
            f"{where} was trained on other frozen weights (sha256 {known[:12]}) than {named} has "
            f"({found[:12]}); give that base, or a merged export"
        )
    return merged(base, adapter.trained, scale=adapter.config.scale, where=where)


def _base(adapter: Adapter, *, wan: Path | None, where: object) -> tuple[dict[str, Tensor], str]:
    """The fp32 weights that adapters are merged into, and a name for them."""
    folder = wan or adapter.settings.get("wan")
    if adapter.init is not None:
        source, averaged = adapter.init
        if not Path(source).exists():
            raise WeightsError(f"{where} was trained on {source}, which does not exist; restore it")
        return load_dit(source, ema=averaged, wan=wan).state_dict, source
    if folder is None or not Path(folder).is_dir():
        what = f"names its base {folder}, which does not exist" if folder else "does not name its base"
        raise WeightsError(f"{where} {what}; give model.wan (--wan)")
    injected = adapter.settings["video_injection"]
    dit = WanFolder(Path(folder)).transformer(video_injection=injected)
    return {name: parameter.detach() for name, parameter in dit.named_parameters()}, str(folder)


def _is_pickle(path: Path) -> bool:
    return path.is_file() and path.suffix != ".safetensors"


def source_settings(source: str) -> dict[str, Any]:
    """The settings of a source of weights, without reading tensors; empty for a .pth file."""
    path = Path(source)
    if (checkpoint := newest(path)) is not None:
        return run_settings(read_run(checkpoint)["state"])
    return export_settings(path) if path.is_dir() else {}


def stored_settings(source: str) -> dict[str, Any]:
    """As `source_settings`, also of the files that an export wrote: no tensor is read."""
    path = Path(source)
    if not path.is_file():
        return source_settings(source)
    return header(path) if path.suffix == ".safetensors" else flowrvs.stored_settings(path)


def trained_step(source: str) -> int | None:
    """The step of a run's newest checkpoint, or of the given one; None for weights that are not from a run."""
    checkpoint = newest(Path(source))
    return int(read_run(checkpoint)["step"]) if checkpoint is not None else None


def newest_checkpoint(source: Path) -> Path:
    """The newest checkpoint of a run, or the step that is given; WeightsError if it is damaged.

    An older one has other weights than the requested ones, so the error names it and the user can request it.
    """
    found = newest(source)
    if found is None:
        raise WeightsError(f"{source} has no complete checkpoint; train until its first one")
    if (problem := damage(found)) is None:
        return found
    earlier = next((path for path in complete(source / CHECKPOINTS)[1:] if damage(path) is None), None)
    fix = f"give {earlier}, the newest undamaged one" if earlier else "it has no undamaged checkpoint"
    raise WeightsError(f"{source} can't be used: {problem}; {fix}")
