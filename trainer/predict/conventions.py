"""The conventions of a DiT's training that can't be derived from its tensors: recorded, requested, or assumed.

Decides which of the three counts, and has the assumed values. Loads nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowmask.models.config import FLOW_PATH, AskedConventions, SamplerConfig
from flowmask.models.errors import ConfigError
from flowmask.models.segment import SegmentSettings
from flowmask.trainer.state.document import Conventions

# The conventions of FlowRVS's weights of 2026, and the defaults of runs.
PUBLISHED: dict[str, Any] = {name: Conventions.model_fields[name].default for name in AskedConventions.model_fields}


@dataclass(frozen=True)
class Settled:
    """The settings of weights with all conventions, and the assumed ones."""

    settings: dict[str, Any]
    assumed: dict[str, Any]

    def said(self) -> str:
        """The message about assumed conventions; empty if all are known."""
        if not self.assumed:
            return ""
        taken = ", ".join(f"{name} {_word(value)}" for name, value in self.assumed.items())
        return (
            f"it does not record all conventions of its training; assumed: {taken}. If the masks are poor, try others "
            "(conventions.KEY, --KEY)"
        )


def settle(told: Mapping[str, Any], asked: AskedConventions, *, where: object) -> Settled:
    """The conventions for using weights that record the values `told`.

    A recorded convention is a fact of the training: a request for another value is a ConfigError. An unrecorded one
    is as requested, else as in `PUBLISHED`.
    """
    wanted = asked.model_dump(exclude_none=True)
    wrong = [
        f"{name} {_word(value)} is asked for, but it was trained with {_word(told[name])}"
        for name, value in wanted.items()
        if told.get(name, value) != value
    ]
    if wrong:
        raise ConfigError(
            f"{where} records its conventions: {'; '.join(wrong)}; remove this setting (conventions.KEY, --KEY)"
        )
    assumed = {name: value for name, value in PUBLISHED.items() if name not in told and name not in wanted}
    return Settled({**told, **assumed, **wanted}, assumed)


def unlike_unasked(told: Mapping[str, Any], asked: AskedConventions) -> dict[str, Any]:
    """The requested conventions that differ from those used without a request."""
    wanted = asked.model_dump(exclude_none=True)
    return {name: value for name, value in wanted.items() if told.get(name, PUBLISHED[name]) != value}


def segment_settings(settings: Mapping[str, Any], *, sampler: SamplerConfig) -> SegmentSettings:
    """The segmentation settings of weights; unrecorded ones are as in `PUBLISHED`."""
    known = {**PUBLISHED, **settings}
    return SegmentSettings(
        sampler=sampler,
        text_tokens=known["text_tokens"],
        mask_latent_norm=known["mask_latent_norm"],
        lowercase=known["lowercase"],
        **{name: known[name] for name in FLOW_PATH if name in known},
    )


def conventions_in(settings: SegmentSettings, *, pixel_norm: str) -> dict[str, str | int | bool]:
    """The four of `AskedConventions` that are used with weights."""
    others = {name: getattr(settings, name) for name in PUBLISHED if name != "pixel_norm"}
    return {"pixel_norm": pixel_norm, **others}


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
