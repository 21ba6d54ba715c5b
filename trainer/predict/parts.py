"""The parts that trainings produce, each one object: its folder in an export, its FlowRVS file, its model.

`makes` of an objective names its part. A new part is an object here and in PARTS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowmask.models.decoders.either import network_of
from flowmask.models.dit import LATENT_CHANNELS, PATCH_KEY
from flowmask.models.errors import WeightsError
from flowmask.models.weights import flowrvs
from flowmask.models.weights.flowrvs_write import write_dit, write_mask_decoder
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.objectives import objective_class

State = dict[str, Tensor]  # weights by name, of any shape
ENCODER = ("encoder.", "quant_conv.")  # the VAE's encoder, stored with an exported mask decoder


@dataclass(frozen=True)
class Part:
    """One part.

    objective: objective of published weights, which do not record it
    read_pth:  (path, ema) -> fp32 weights and settings of a FlowRVS file
    write_pth: (path, last, averaged, settings); both weights are the same unless `pth_holds_both`
    empty:     diffusers' model on the meta device
    join:      joins the trained weights with the frozen ones that are stored with them, if any
    """

    name: str
    folder: str
    objective: str
    read_pth: Callable[..., tuple[State, dict[str, Any]]]
    write_pth: Callable[..., None]
    empty: Callable[[State, WanFolder], Any]
    join: Callable[[State, WanFolder], State] | None = None
    takes_adapters: bool = False
    pth_holds_both: bool = False


def _with_encoder(decoder: State, wan: WanFolder) -> State:
    """The trained decoder joined with the frozen encoder of its VAE, by diffusers' names."""
    vae: Any = wan.vae(next(iter(decoder.values())).dtype)
    return {**{name: t for name, t in vae.state_dict().items() if name.startswith(ENCODER)}, **decoder}


def _write_decoder_pth(path: Path, last: State, averaged: State, settings: Mapping[str, Any]) -> None:
    if network_of(last, where=path) is not None:
        raise WeightsError("FlowRVS's layout has no place for a light mask decoder; use diffusers or safetensors")
    write_mask_decoder(path, vae=last, settings=settings)


DIT = Part(
    *("dit", "transformer", "flow_matching"),
    read_pth=flowrvs.load_dit,
    write_pth=lambda path, last, averaged, settings: write_dit(path, model=last, ema=averaged, settings=settings),
    empty=lambda state, wan: wan.empty_transformer(video_injection=video_injected(state)),
    takes_adapters=True,
    pth_holds_both=True,
)
MASK_DECODER = Part(
    *("mask_decoder", "mask_decoder", "mask_decoder"),
    read_pth=flowrvs.load_mask_decoder,
    write_pth=_write_decoder_pth,
    empty=lambda state, wan: wan.empty_vae(out_channels=1),
    join=_with_encoder,
)


def _no_pth(*_: Any, **__: Any) -> Any:
    raise WeightsError("FlowRVS's layout has no place for a text-to-video DiT; use --format diffusers")


VIDEO_DIT = Part(
    *("video_dit", "transformer", "text_to_video"),
    read_pth=_no_pth,
    write_pth=_no_pth,
    empty=lambda state, wan: wan.empty_transformer(video_injection=False),
    takes_adapters=True,
)
PARTS: dict[str, Part] = {part.name: part for part in (DIT, MASK_DECODER, VIDEO_DIT)}


def part_trained(settings: Mapping[str, Any]) -> Part | None:
    """The part that weights of these settings form; None if they name no objective."""
    objective = settings.get("objective")
    return None if objective is None else PARTS[objective_class(str(objective)).makes]


def refuse_other_part(settings: Mapping[str, Any], part: Part, *, where: object) -> None:
    """WeightsError if weights of these settings are not `part`."""
    trained = part_trained(settings)
    if trained not in (None, part):
        raise WeightsError(
            f"{where} trained {settings['objective']}, but weights of {part.name} are needed; give such weights"
        )


def video_injected(state: Mapping[str, Tensor]) -> bool:
    """Whether a DiT has video injection, from its patch embedding [D channels 1 2 2], not from a config."""
    weight = state.get(PATCH_KEY)
    return weight is not None and weight.shape[1] == 2 * LATENT_CHANNELS
