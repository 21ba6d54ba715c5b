"""The conventions of a DiT's training that its tensors can't tell: those that are remembered, asked for, or assumed.

Owns the order in which the three count, and what is assumed. Loads nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowmask.models.config import FLOW_PATH, AskedConventions, SamplerConfig
from flowmask.models.errors import ConfigError
from flowmask.models.segment import SegmentSettings
from flowmask.trainer.state.document import Conventions

# What FlowRVS's weights of 2026 were trained with, and what runs take that say nothing else.
PUBLISHED: dict[str, Any] = {name: Conventions.model_fields[name].default for name in AskedConventions.model_fields}


@dataclass(frozen=True)
class Settled:
    """The settings of weights with every convention in them, and those of them that are assumed."""

    settings: dict[str, Any]
    assumed: dict[str, Any]

    def said(self) -> str:
        """The line about what is assumed; empty if all is known."""
        if not self.assumed:
            return ""
        taken = ", ".join(f"{name} {_word(value)}" for name, value in self.assumed.items())
        return (
            f"it does not tell all conventions of its training; assumed: {taken}. If the masks are poor, try others "
            "(conventions.KEY, --KEY)"
        )


def settle(told: Mapping[str, Any], asked: AskedConventions, *, where: object) -> Settled:
    """The conventions that weights which record `told` are used with.

    A recorded convention is a fact of the training: asking for another value is a ConfigError. One that is not recorded
    is as asked for, else as in `PUBLISHED`.
    """
    wanted = asked.model_dump(exclude_none=True)
    wrong = [
        f"{name} is {_word(value)}, but it was trained with {_word(told[name])}"
        for name, value in wanted.items()
        if told.get(name, value) != value
    ]
    if wrong:
        raise ConfigError(
            f"{where} remembers its conventions: {'; '.join(wrong)}; leave that out (conventions.KEY, --KEY)"
        )
    assumed = {name: value for name, value in PUBLISHED.items() if name not in told and name not in wanted}
    return Settled({**told, **assumed, **wanted}, assumed)


def unlike_unasked(told: Mapping[str, Any], asked: AskedConventions) -> dict[str, Any]:
    """Those of the asked conventions that differ from what would be taken without asking."""
    wanted = asked.model_dump(exclude_none=True)
    return {name: value for name, value in wanted.items() if told.get(name, PUBLISHED[name]) != value}


def segment_settings(settings: Mapping[str, Any], *, sampler: SamplerConfig) -> SegmentSettings:
    """How weights of these settings segment; where they tell nothing, as `PUBLISHED`."""
    known = {**PUBLISHED, **settings}
    return SegmentSettings(
        sampler=sampler,
        text_tokens=known["text_tokens"],
        mask_latent_norm=known["mask_latent_norm"],
        lowercase=known["lowercase"],
        **{name: known[name] for name in FLOW_PATH if name in known},
    )


def conventions_in(settings: SegmentSettings, *, pixel_norm: str) -> dict[str, str | int | bool]:
    """The four of `AskedConventions`, with which weights are used."""
    others = {name: getattr(settings, name) for name in PUBLISHED if name != "pixel_norm"}
    return {"pixel_norm": pixel_norm, **others}


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
