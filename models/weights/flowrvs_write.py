"""FlowMask's weights in the layout of FlowRVS's training files, which `flowrvs.py` and the published code read.

Only tensors, numbers and strings are written, so that the file loads with `weights_only=True`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmask.models.errors import WeightsError
from flowmask.models.files import whole_file
from flowmask.models.weights.flowrvs import SETTINGS, reference_order


def write_dit(
    path: Path, *, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """A DiT: `model` by name, `ema_model.shadow_params` as the bare list in FlowRVS' order; both of the DiT's shapes.

    WeightsError for a parameter that FlowRVS does not have.
    """
    order = reference_order(model)
    if set(order) != set(model) or set(order) != set(ema):
        strangers = sorted(set(order) ^ set(model) | set(order) ^ set(ema))
        raise WeightsError(f"FlowRVS's layout has no place for {', '.join(strangers[:3])}; use diffusers")
    shadows = [ema[name].contiguous() for name in order]
    _write(path, {"model": dict(model), "ema_model": {"shadow_params": shadows}, SETTINGS: dict(settings)})


def write_mask_decoder(path: Path, *, vae: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """A whole VAE under `vae.`, by name and of any shape; its decoder has one channel, its encoder is for the video."""
    model = {f"vae.{name}": tensor.contiguous() for name, tensor in vae.items()}
    _write(path, {"model": model, SETTINGS: dict(settings)})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        torch.save(content, file)
