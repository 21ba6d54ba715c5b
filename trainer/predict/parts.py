"""The parts of the product that trainings make, each one object: its folder in an export, its FlowRVS file, its model.

A part is what `makes` of an objective says. A further one is a subclass here and a line in PARTS.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from flowmask.models.dit import LATENT_CHANNELS, PATCH_KEY
from flowmask.models.errors import WeightsError
from flowmask.models.weights import flowrvs
from flowmask.models.weights.flowrvs_write import write_dit, write_mask_decoder
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.objectives import objective_class

State = dict[str, Tensor]
ENCODER = ("encoder.", "quant_conv.")  # of the VAE that goes with an exported mask decoder


class Part(ABC):
    """One part; `objective`: the one that published weights were trained with, which say none."""

    name: ClassVar[str]
    folder: ClassVar[str]
    objective: ClassVar[str]
    takes_adapters: ClassVar[bool] = False
    pth_holds_both: ClassVar[bool] = False  # averaged and last weights

    @abstractmethod
    def read_pth(self, path: Path, *, ema: bool) -> tuple[State, dict[str, Any]]:
        """fp32 weights and settings of a FlowRVS file."""

    @abstractmethod
    def write_pth(
        self, path: Path, *, last: State, averaged: State, settings: Mapping[str, Any], wan: Callable[[], WanFolder]
    ) -> None:
        """The FlowRVS file; a part whose file holds one set of weights takes `last`."""

    @abstractmethod
    def model(self, state: State, wan: WanFolder) -> tuple[Any, State]:
        """diffusers' model on the meta device, and all of its tensors."""


class _Dit(Part):
    name, folder, objective = "dit", "transformer", "flow_matching"
    takes_adapters = pth_holds_both = True

    def read_pth(self, path: Path, *, ema: bool) -> tuple[State, dict[str, Any]]:
        return flowrvs.load_dit(path, ema=ema)

    def write_pth(
        self, path: Path, *, last: State, averaged: State, settings: Mapping[str, Any], wan: Callable[[], WanFolder]
    ) -> None:
        write_dit(path, model=last, ema=averaged, settings=settings)

    def model(self, state: State, wan: WanFolder) -> tuple[Any, State]:
        return wan.empty_transformer(video_injection=video_injected(state)), state


class _MaskDecoder(Part):
    name = folder = objective = "mask_decoder"

    def read_pth(self, path: Path, *, ema: bool) -> tuple[State, dict[str, Any]]:
        return flowrvs.load_mask_decoder(path, ema=ema)

    def write_pth(
        self, path: Path, *, last: State, averaged: State, settings: Mapping[str, Any], wan: Callable[[], WanFolder]
    ) -> None:
        write_mask_decoder(path, vae=self._whole(last, wan()), settings=settings)

    def model(self, state: State, wan: WanFolder) -> tuple[Any, State]:
        return wan.empty_vae(out_channels=1), self._whole(state, wan)

    def _whole(self, decoder: State, wan: WanFolder) -> State:
        """The trained decoder joined with the frozen encoder of its VAE, by diffusers' names."""
        vae: Any = wan.vae(next(iter(decoder.values())).dtype)
        return {**{name: t for name, t in vae.state_dict().items() if name.startswith(ENCODER)}, **decoder}


DIT, MASK_DECODER = _Dit(), _MaskDecoder()
PARTS: dict[str, Part] = {part.name: part for part in (DIT, MASK_DECODER)}


def part_trained(settings: Mapping[str, Any]) -> Part | None:
    """The part that weights of these settings are; None if they name no objective."""
    objective = settings.get("objective")
    return None if objective is None else PARTS[objective_class(str(objective)).makes]


def refuse_other_part(settings: Mapping[str, Any], part: Part, *, where: object) -> None:
    """WeightsError if weights of these settings are not `part`."""
    trained = part_trained(settings)
    if trained not in (None, part):
        raise WeightsError(
            f"{where} trained {settings['objective']}, but the weights of {part.name} are needed; give those"
        )


def video_injected(state: Mapping[str, Tensor]) -> bool:
    """Whether a DiT takes the video: told by the shape of the patch embedding, never by a config."""
    weight = state.get(PATCH_KEY)
    return weight is not None and weight.shape[1] == 2 * LATENT_CHANNELS
