"""A YAML laid over a config of any kind: the places of its folders, and KEY: VALUE by the kind of job.

Order of strength: defaults < file < overlays, from left to right < KEY=VALUE. One file can serve every config, for
example for a machine or a small synthetic world: `flowmask train CONFIG OVERLAY train.steps=10`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from flowmask.launch.config import as_written, load_yaml, readable, resolved, set_key, validate
from flowmask.models.config import Section
from flowmask.models.errors import ConfigError

_SUFFIXES = (".yaml", ".yml")


class OverlayConfig(Section):
    """The keys of an overlay. Keys of a section may be dotted or nested."""

    paths: dict[str, Path] = Field(
        {}, description="PATH: OTHER; what is PATH or lies below it is OTHER instead, from the overlay's folder"
    )
    launch: dict[str, Any] = Field({}, description="over the `launch` section of every config")
    cache: dict[str, Any] = Field({}, description="over every cache")
    train: dict[str, Any] = Field({}, description="over every training, of a DiT or a mask decoder")
    evaluate: dict[str, Any] = Field({}, description="over every evaluation")
    study: dict[str, Any] = Field({}, description="over a study's own keys")
    world: dict[str, Any] = Field({}, description="over world.dataset of a study that has one")


@dataclass(frozen=True)
class Overlay:
    """A parsed overlay. path: its file; its `paths` are relative to the file's folder."""

    path: Path
    config: OverlayConfig

    def keys(self, section: str) -> dict[str, Any]:
        """KEY: VALUE of a section, every key dotted."""
        return dict(_dotted(getattr(self.config, section)))

    def moved(self, tree: Any) -> Any:
        """The keys of a config, with every path moved to the overlay's place."""
        if isinstance(tree, dict):
            return {key: self.moved(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self.moved(value) for value in tree]
        return self._moved(tree) if isinstance(tree, str) else tree

    def _moved(self, text: str) -> str:
        for name in sorted(self.config.paths, key=len, reverse=True):
            if text == name or text.startswith(f"{name}/"):
                return f"{self.path.parent / self.config.paths[name]}{text[len(name) :]}"
        return text

    def over(self, config: DictConfig, kind: str) -> DictConfig:
        """The keys of a job of a kind, with this overlay applied."""
        found = OmegaConf.create(self.moved(as_written(config)))
        assert isinstance(found, DictConfig)
        launch = {f"launch.{key}": value for key, value in self.keys("launch").items()}
        for key, value in (launch | self.keys(kind)).items():
            set_key(found, key, value, where=str(self.path))
        return found


def split(arguments: Sequence[str]) -> tuple[list[Overlay], list[str]]:
    """The arguments after a config on the command line: the overlays, and the KEY=VALUE."""
    named = [item for item in arguments if "=" not in item and item.endswith(_SUFFIXES)]
    return [read_overlay(Path(name)) for name in named], [item for item in arguments if item not in named]


def read_overlay(path: Path) -> Overlay:
    """Read an overlay; ConfigError in one line if it is none."""
    if not path.is_file():
        raise ConfigError(f"overlay {path} does not exist; behind a config stand KEY=VALUE and YAML to lay over it")
    with readable(path):
        tree = resolved(load_yaml(path))
    if "out" in tree:
        known = ", ".join(OverlayConfig.model_fields)
        raise ConfigError(f"{path} is a config, not an overlay, whose keys are {known}; give a command one config")
    return Overlay(path, validate(tree, OverlayConfig, origin=str(path)))


def _dotted(section: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
