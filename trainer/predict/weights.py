"""Trained weights by name: a run folder, an export (folder or .safetensors) or a FlowRVS .pth.

Each comes with the conventions it was trained with.

Owns what counts as which, and the refusal of weights whose conventions are not the ones asked for. Whole
tensors in fp32 on the host; nothing here needs a process group or a GPU.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowmask.models.errors import CheckpointError, WeightsError
from flowmask.models.lora import ADAPTER_CONFIG, frozen_part, merged
from flowmask.models.strict import SafetensorsFolder, load_strict, read_json
from flowmask.models.weights.flowrvs import SETTINGS
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.adapters import Adapter, adapter_in_run, read_adapter
from flowmask.trainer.state.checkpoint import complete, read_full, read_state, verify
from flowmask.trainer.state.run_folder import CHECKPOINTS

EXPORT_SETTINGS = "flowmask.json"
EXPORT_STEM = "diffusion_pytorch_model"
_ENCODER = ("encoder.", "quant_conv.")  # of the VAE that goes with an exported mask decoder
PARTS = {"flow_matching": "transformer", "mask_decoder": "mask_decoder"}


@dataclass(frozen=True)
class LoadedWeights:
    """fp32 tensors by name; `settings` holds what is known of their conventions, `sha256` identifies their
    values.

    A run's settings also name its `wan` folder and its `mask_decoder`.
    """

    state_dict: dict[str, Tensor]
    settings: dict[str, Any]
    sha256: str


def load_dit(source: str, *, ema: bool = True, wan: Path | None = None) -> LoadedWeights:
    """A DiT's weights from a run (its newest complete checkpoint), one of its steps, an export or a .pth file.

    ema: the averaged weights where the source has both. wan: the Wan folder that adapters are merged into;
    default: that of their run. Raises UserError naming what is missing, damaged or not the base.
    """
    return _load(source, objective="flow_matching", ema=ema, wan=wan)


def load_adapter(source: str, *, ema: bool = True) -> Adapter:
    """What a LoRA run (or one of its steps, or an exported adapter) trained, without its base."""
    path = Path(source)
    found = None
    if _is_run(path):
        checkpoint, saved = _saved(path)
        found = adapter_in_run(checkpoint, saved, ema=ema)
    elif (path / ADAPTER_CONFIG).is_file():
        found = read_adapter(path, _export_settings(path))
    if found is None:
        raise WeightsError(f"{source} has no LoRA adapters; export it in another format")
    return found


def load_mask_decoder(source: str, *, ema: bool = True) -> LoadedWeights:
    """A mask decoder's weights, `decoder.*` and `post_quant_conv.*`; sources and errors as for `load_dit`."""
    return _load(source, objective="mask_decoder", ema=ema)


def start_from(
    source: str, module: nn.Module, *, ema: bool, settings: Mapping[str, Any], wan: Path | None = None
) -> dict[str, Any]:
    """Put trained weights into `module`; what was taken. WeightsError if `settings` disagree."""
    loaded = _load(source, objective=settings["objective"], ema=ema, wan=wan)
    differ = [
        f"{key} {loaded.settings[key]} there, {wanted} here"
        for key, wanted in settings.items()
        if loaded.settings.get(key, wanted) != wanted
    ]
    if differ:
        raise WeightsError(f"model.init {source} was trained with other settings: {'; '.join(differ)}. Make them equal")
    load_strict(module, loaded.state_dict, where=source, fix="Use the model.wan that it was trained from")
    return {"source": source, "ema": ema, "sha256": loaded.sha256}


def content_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes and values: equal weights have equal hashes, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(source: str, *, objective: str, ema: bool, wan: Path | None = None) -> LoadedWeights:
    path = Path(source)
    if _is_run(path):
        state, settings = _from_run(path, objective=objective, ema=ema, wan=wan)
    elif (path / ADAPTER_CONFIG).is_file() and objective == "flow_matching":
        adapter = load_adapter(source)
        state, settings = _merged(adapter, wan=wan, where=source), adapter.settings
    elif path.is_dir():
        state, settings = _from_export(path, objective=objective)
    elif path.suffix == ".safetensors" and path.is_file():
        state, settings = _from_safetensors(path, objective=objective)
    elif path.is_file():
        state, settings = _from_pth(path, objective=objective, ema=ema)
    else:
        raise WeightsError(f"{source} does not exist; give a run folder, an export or a FlowRVS .pth file")
    return LoadedWeights(state, settings, content_sha256(state))


def _is_run(path: Path) -> bool:
    return (path / CHECKPOINTS).is_dir() or (path / "state.json").is_file()


def _saved(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a run, or one of its steps, stands for, and its state."""
    checkpoint = path if (path / "state.json").is_file() else newest_checkpoint(path)
    return checkpoint, read_state(checkpoint)["state"]


def _from_run(path: Path, *, objective: str, ema: bool, wan: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    checkpoint, saved = _saved(path)
    trained = saved["settings"]["objective"]
    if trained != objective:
        raise WeightsError(f"{path} trained {trained}, but the weights of {objective} are needed; give such a run")
    adapter = adapter_in_run(checkpoint, saved, ema=ema)
    if adapter is not None:
        return _merged(adapter, wan=wan, where=path), _run_settings(saved)
    return read_full(checkpoint, kind="ema" if ema else "master"), _run_settings(saved)


def _merged(adapter: Adapter, *, wan: Path | None, where: object) -> dict[str, Tensor]:
    """The whole DiT of adapters; WeightsError unless the base is there and is the one that they were trained on."""
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
    """The fp32 weights that adapters are put into, and what they are called."""
    folder = wan or adapter.settings.get("wan")
    if adapter.init is not None:
        source, averaged = adapter.init
        if not Path(source).exists():
            raise WeightsError(f"{where} was trained on {source}, which is not there; put it back")
        return load_dit(source, ema=averaged, wan=wan).state_dict, source
    if folder is None or not Path(folder).is_dir():
        what = f"names its base {folder}, which is not there" if folder else "does not say where its base is"
        raise WeightsError(f"{where} {what}; give model.wan (--wan)")
    injected = adapter.settings["video_injection"]
    dit = WanFolder(Path(folder)).transformer(video_injection=injected)
    return {name: parameter.detach() for name, parameter in dit.named_parameters()}, str(folder)


def _run_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    model = saved["config"]["model"]
    return {**saved["settings"], "wan": model["wan"], "mask_decoder": model["mask_decoder"]}


def source_settings(source: str) -> dict[str, Any]:
    """What is known of a source of weights without reading them; nothing for a .pth file."""
    path = Path(source)
    steps = [path] if (path / "state.json").is_file() else complete(path / CHECKPOINTS)
    if steps:
        return _run_settings(read_state(steps[0])["state"])
    if path.is_dir():
        return _export_settings(path)
    return {}


def newest_checkpoint(run: Path) -> Path:
    """The newest undamaged checkpoint of a run."""
    problems = []
    for checkpoint in complete(run / CHECKPOINTS):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return checkpoint
    reason = f" ({'; '.join(problems)})" if problems else ""
    raise WeightsError(f"{run} has no complete checkpoint{reason}; train until its first one")


def _from_export(path: Path, *, objective: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    part = path / PARTS[objective]
    if not part.is_dir():
        raise WeightsError(f"{path} is neither a run folder (no {CHECKPOINTS}/) nor an export (no {part.name}/)")
    settings = _export_settings(path)
    if objective == "mask_decoder":
        settings.pop("mask_decoder", None)
    with SafetensorsFolder(part, EXPORT_STEM) as weights:
        kept = [key for key in weights.shapes() if not key.startswith(_ENCODER)]
        state = {key: weights.tensor(key, torch.float32) for key in kept}
    return state, settings


def _export_settings(path: Path) -> dict[str, Any]:
    """What an export's own file says; its mask decoder is the one that lies beside the DiT."""
    settings = read_json(path / EXPORT_SETTINGS) if (path / EXPORT_SETTINGS).is_file() else {}
    if (path / PARTS["mask_decoder"]).is_dir():
        settings["mask_decoder"] = str(path)
    return settings


def _from_safetensors(path: Path, *, objective: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One file of weights whose settings stand in its own header."""
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get(SETTINGS, "{}"))
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({' '.join(str(error).split())}); get it again") from None
    trained = settings.get("objective", objective)
    if trained != objective:
        raise WeightsError(f"{path} holds weights of {trained}, not of {objective}; give those")
    return state, settings


def _from_pth(path: Path, *, objective: str, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from flowmask.models.weights import flowrvs

    load = flowrvs.load_dit if objective == "flow_matching" else flowrvs.load_mask_decoder
    return load(path, ema=ema)
