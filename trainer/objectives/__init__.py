"""The objectives: each is one file, here or in an installed package, and needs no other change.

Its name, `objective.kind`, is that of its file, or of an entry point of the group `flowmask.objectives`. The contract
is `base.Objective`. Imports the data and the models, and nothing of the trainer.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowmask.models.config import ModelConfig
from flowmask.models.plugins.registry import Registry
from flowmask.trainer.objectives.base import Objective, ObjectiveConfig

if TYPE_CHECKING:
    from flowmask.models.vae import LatentStats

_KINDS = Registry(__name__, Objective, group="flowmask.objectives", key="objective.kind")  # type: ignore[type-abstract]
DEFAULT_KIND = "flow_matching"
# Earlier versions had one section for all kinds, and runs saved the keys of both; the other kind's keys had no
# effect.
_ONCE_OF_ALL_KINDS = {
    *("boundary_bias", "boundary_probability", "start_point_augmentation", "video_injection", "latent_noise_std"),
    *("focal_weight", "focal_alpha", "focal_gamma", "dice_weight"),
}


def objective_names() -> list[str]:
    """Every known kind, also of installed packages."""
    return _KINDS.names()


def objective_class(kind: str) -> type[Objective]:
    """The objective of a name. Raises ConfigError with the list of known ones."""
    return _KINDS.get(kind)


def objective_named(config: ObjectiveConfig, *, model: ModelConfig, stats: "LatentStats | None" = None) -> Objective:
    """The objective of a config section.

    stats: the latents' mean and standard deviation, from the cache's manifest (training has no VAE); None
    if only shapes and settings are needed
    """
    from flowmask.models.vae import LatentStats

    return objective_class(config.kind)(config, model, stats or LatentStats(mean=(0.0,) * 16, std=(1.0,) * 16))


def section(value: Any = None) -> Any:
    """The config section of the kind that a mapping names, parsed strictly.

    pydantic reports a value that is not a mapping.
    """
    if not isinstance(value, Mapping | None):
        return value
    given = {"kind": DEFAULT_KIND, **(value or {})}
    kind = objective_class(str(given["kind"])).Config
    unknown = [key for key in given if key not in kind.model_fields]
    if unknown:
        known = ", ".join(sorted(kind.model_fields))
        raise ValueError(f"unknown key objective.{unknown[0]}; objective of kind {given['kind']} knows {known}")
    return kind.model_validate(given)


def of_one_kind(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved objective section, without the keys of other kinds that older runs saved."""
    if not saved.keys() >= _ONCE_OF_ALL_KINDS:
        return dict(saved)
    known = objective_class(str(saved.get("kind", DEFAULT_KIND))).Config.model_fields
    return {key: value for key, value in saved.items() if key in known or key not in _ONCE_OF_ALL_KINDS}
