"""The trained weights of a LoRA run, from a checkpoint or from an exported adapter's folder.

Neither holds the base; its frozen weights are identified by their hash.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowmask.models.config import LoraConfig
from flowmask.models.errors import WeightsError
from flowmask.models.lora import ADAPTER_WEIGHTS, read_names
from flowmask.models.stored.regular import open_regular
from flowmask.trainer.state.checkpoint import read_full


@dataclass(frozen=True)
class Adapter:
    """The trained part of a LoRA run, and the base that it belongs to.

    trained: fp32 by plain name: A [rank in] and B [out rank] of each adapter, and of fully trained weights
    frozen: number and hash of the base's frozen parameters
    settings: the conventions of the training; init: `model.init` of the run and whether its EMA was used
    """

    trained: dict[str, Tensor]
    config: LoraConfig
    frozen: Mapping[str, Any]
    settings: dict[str, Any]
    init: tuple[str, bool] | None = None


def run_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The conventions of a run whose state is `saved`, and the paths of its Wan folder and mask decoder.

    encoder_dtype: dtype of the encoders of its cache, unless its caches differ in it
    """
    model = saved["config"]["model"]
    encoded = saved.get("fingerprint", {}).get("fields", {}).get("cache.encoder_dtype")
    known = {"encoder_dtype": encoded} if encoded else {}
    return {**saved["settings"], **known, "wan": model["wan"], "mask_decoder": model["mask_decoder"]}


def adapter_in_run(checkpoint: Path, saved: Mapping[str, Any], *, ema: bool) -> Adapter | None:
    """The adapter in a checkpoint whose state is `saved`; None if the run trained the whole module."""
    config, model = saved["config"], saved["config"]["model"]
    if not config.get("lora"):
        return None
    return Adapter(
        read_full(checkpoint, kind="ema" if ema else "master"),
        LoraConfig.model_validate(config["lora"]),
        saved["frozen"],
        run_settings(saved),
        (model["init"], model["init_ema"]) if model.get("init") else None,
    )


def read_adapter(folder: Path, settings: Mapping[str, Any]) -> Adapter:
    """An exported adapter's folder; `settings` is its own settings file. WeightsError if it is damaged."""
    path = folder / ADAPTER_WEIGHTS
    try:
        os.close(open_regular(path))
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        config = LoraConfig.model_validate(settings["lora"])
        frozen = settings["frozen"]
    except KeyError as missing:
        raise WeightsError(
            f"{folder} does not state {missing} of its training; export the run again, or merge it with peft"
        ) from None
    except (OSError, SafetensorError, ValidationError) as error:
        raise WeightsError(f"{path} cannot be read ({' '.join(str(error).split())}); export it again") from None
    kept = {name: value for name, value in settings.items() if name not in ("lora", "frozen")}
    return Adapter(read_names(tensors, where=path), config, frozen, kept)
