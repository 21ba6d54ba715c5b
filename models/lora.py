"""Low-rank adapters (LoRA) in a DiT, through peft: insertion, initialisation, merge, and peft's folder.

Decides the names: parameters have the names of the DiT without adapters, and an adapter's two factors are
`<layer>.lora_A.weight` [r in] and `<layer>.lora_B.weight` [out r]; peft's nesting is hidden from other code.
Refuses targets that are no linear layer, and a frozen patch embedding that would ignore the injected video.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowmask.models.config import LoraConfig
from flowmask.models.errors import ConfigError, WeightsError
from flowmask.models.process import compiling_later
from flowmask.models.strict import check_shapes

PATCH = "patch_embedding"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # prefix of every name in peft's files
_A, _B = ".lora_A.weight", ".lora_B.weight"
_ADAPTER = "default"
_VIDEO_CHANNELS = slice(16, None)  # of the patch embedding's input, after those of x_t


def plain_name(name: str) -> str:
    """A parameter's name without peft's nesting; names of a module without adapters are unchanged."""
    name = name.replace(".base_layer.", ".")
    return name.replace(f".lora_A.{_ADAPTER}.", ".lora_A.").replace(f".lora_B.{_ADAPTER}.", ".lora_B.")


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As `module.named_parameters()`, by plain names."""
    return ((plain_name(name), parameter) for name, parameter in module.named_parameters())


def add_lora(dit: nn.Module, config: LoraConfig, *, seed: int) -> None:
    """Insert adapters into a DiT with its base weights, and freeze all other weights except `also_train`.

    The outputs do not change: B is zero. A is drawn from (seed, name) alone. Raises ConfigError for names
    that match nothing, and if the zero channels of the injected video would not be trained.
    """
    with compiling_later():
        from peft import inject_adapter_in_model

    _check_targets(dit, config)
    whole = _trained_whole(dit, config)
    inject_adapter_in_model(_peft_config(config), dit, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    for name, layer in list(dit.named_modules()):
        if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"):
            for factors, make in ((layer.lora_A, _uniform), (layer.lora_B, _zeros)):
                weight = factors[_ADAPTER].weight
                factors[_ADAPTER].weight = nn.Parameter(make(tuple(weight.shape), f"{seed} {name}"))
    for name, parameter in named_parameters(dit):
        parameter.requires_grad_(name.endswith((_A, _B)) or name in whole)


def merged(
    base: Mapping[str, Tensor], trained: Mapping[str, Tensor], *, scale: float, where: object
) -> dict[str, Tensor]:
    """The whole DiT: fp32 `base` with fully trained weights replaced from `trained`, and scale·B·A added (LoRA).

    trained: by name, A [rank in] and B [out rank] of each adapter, and whole parameters of the base's shapes
    WeightsError if a trained tensor has no place in the base.
    """
    frozen = frozen_part(base, trained)
    layers = [name.removesuffix(_A) for name in trained if name.endswith(_A)]
    expected: dict[str, tuple[int, ...]] = {n: tuple(base[n].shape) for n in base if n not in frozen}
    for layer in layers:
        rank = trained[layer + _A].shape[0]
        out, into = base[f"{layer}.weight"].shape if f"{layer}.weight" in base else (0, 0)
        expected |= {layer + _A: (rank, into), layer + _B: (out, rank)}
    found = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    check_shapes(expected, found, where=where, fix="Give the base that it was trained on")
    whole = {**frozen, **{name: tensor for name, tensor in trained.items() if name in base}}
    for layer in layers:
        update = trained[layer + _B].float() @ trained[layer + _A].float()
        whole[f"{layer}.weight"] = torch.add(base[f"{layer}.weight"], update, alpha=scale)
    return {name: whole[name] for name in base}


def frozen_part(base: Mapping[str, Tensor], trained: Mapping[str, Any]) -> dict[str, Tensor]:
    """The base's tensors, of any shape, that a run with the trained weights `trained` did not change."""
    return {name: tensor for name, tensor in base.items() if name not in trained}


def write_adapter(folder: Path, trained: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write a folder for `peft.PeftModel.from_pretrained(dit, folder)` and diffusers' `load_lora_adapter`.

    trained: by name, A [rank in] and B [out rank] of each adapter, and whole parameters, of any shape.
    diffusers reads the config from the header of the weights; fully trained layers are in `modules_to_save`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = sorted({name.rpartition(".")[0] for name in trained if not name.endswith((_A, _B))})
    described = _peft_config(config, whole=whole)
    described.inference_mode = True
    described.save_pretrained(str(folder))
    told = json.loads((folder / ADAPTER_CONFIG).read_text())
    told["target_modules"] = sorted(told["target_modules"])  # the order of peft's set differs between processes
    (folder / ADAPTER_CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    header = {f"{PEFT_PREFIX}{key}": told[key] for key in ("r", "lora_alpha", "target_modules", "peft_type")}
    if whole:
        header[f"{PEFT_PREFIX}modules_to_save"] = whole
    tensors = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in trained.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(header)}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata=metadata)


def _peft_config(config: LoraConfig, *, whole: list[str] | None = None) -> Any:
    with compiling_later():
        from peft import LoraConfig as PeftConfig

    alpha: Any = config.rank if config.alpha is None else config.alpha
    return PeftConfig(
        r=config.rank, lora_alpha=alpha, target_modules=list(config.targets), modules_to_save=whole or None
    )


def _fits(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _check_targets(dit: nn.Module, config: LoraConfig) -> None:
    modules = [(name, module) for name, module in dit.named_modules() if name]
    linear = {name for name, module in modules if isinstance(module, nn.Linear)}
    for target in config.targets:
        found = [name for name, _ in modules if _fits(name, target)]
        if not found or not linear.issuperset(found):
            what = "fits no layer of the DiT" if not found else f"fits {found[0]}, which is not linear"
            raise ConfigError(f"lora.targets has {target!r}, which {what}; known: {_ends(linear)}")


def _ends(linear: set[str]) -> str:
    """The allowed names in `targets`: names of linear layers without the number of their block."""
    return ", ".join(sorted({n.split(".", 2)[2] if n.startswith("blocks.") else n for n in linear}))


def _trained_whole(dit: nn.Module, config: LoraConfig) -> set[str]:
    """Names of the fully trained parameters."""
    patch: Any = dict(dit.named_modules()).get(PATCH)
    video = patch.weight[:, _VIDEO_CHANNELS] if patch is not None else torch.empty(0)
    asked = config.also_train
    if asked is None:
        asked = (PATCH,) if video.numel() else ()
    targeted = {name for name, _ in dit.named_modules() if any(_fits(name, t) for t in config.targets)}
    names: set[str] = set()
    for entry in asked:
        modules = [name for name, _ in dit.named_modules() if name and _fits(name, entry)]
        inside = {n for n, _ in dit.named_parameters() if any(n.startswith(f"{m}.") for m in modules)}
        if not inside:
            raise ConfigError(f"lora.also_train has {entry!r}, which matches no module of the DiT with weights")
        both = sorted(t for t in targeted if f"{t}.weight" in inside)
        if both:
            raise ConfigError(f"lora.also_train has {entry!r}, but {both[0]} is one of lora.targets; remove one")
        names |= inside
    if video.numel() and f"{PATCH}.weight" not in names and not video.any():
        raise ConfigError(
            f"lora.also_train is {list(asked)}, but the {PATCH}'s channels for the injected video are all zero "
            f"and would stay so; add {PATCH}, or set objective.video_injection=false"
        )
    return names


def _uniform(shape: tuple[int, ...], key: str) -> Tensor:
    """A's initial value [r in], as in peft (Kaiming, a = sqrt 5), but from `key` alone."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(number))


def _zeros(shape: tuple[int, ...], key: str) -> Tensor:
    return torch.zeros(shape)


def read_names(tensors: Mapping[str, Tensor], *, where: object) -> dict[str, Tensor]:
    """An adapter file's tensors, of any shape, by plain names; WeightsError if they are not peft's."""
    strange = [name for name in tensors if not name.startswith(PEFT_PREFIX)]
    if strange or not tensors:
        raise WeightsError(f"{where} is not a peft adapter ({', '.join(strange[:3]) or 'it is empty'})")
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
