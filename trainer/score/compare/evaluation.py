"""Reads a published evaluation: its scores by expression, and its masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.formats.picture import read_object_mask
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.models.errors import ConfigError, UserError
from flowmask.models.files import read_object
from flowmask.models.stored.typed import read_yaml, validated
from flowmask.trainer.score.store import CONFIG, MASKS, SCORES

Pair = tuple[str, str]  # video id, expression id
Found = dict[Pair, tuple[Video, Expression]]


@dataclass(frozen=True)
class Evaluated:
    """Scores of one evaluation.

    path:   as given; folder: of its other files, if they exist
    scores: every metric of each expression; keys: name of each expression's folder of masks
    left_empty: for expressions that name nothing, whether the mask is empty; missing in older evaluations
    data:   the dataset in its config; None if the config can't be read
    """

    path: Path
    folder: Path
    scores: dict[Pair, dict[str, float]]
    keys: dict[Pair, str]
    left_empty: dict[Pair, bool]
    data: DataSourceConfig | None

    def masks(self, pair: Pair, names: Sequence[str], *, size: tuple[int, int]) -> NDArray[np.bool_] | None:
        """The predicted masks bool [n H W] of some frames; None if one no longer exists."""
        folder = self.folder / MASKS / self.keys[pair]
        try:
            return np.stack([read_object_mask(folder / f"{name}.png", size=size) for name in names])
        except (UserError, OSError):
            return None


def open_evaluation(path: Path) -> Evaluated:
    """The evaluation in a folder, or of a scores.json; raises ConfigError if it is none, or has no scores."""
    file = path / SCORES if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{path} is not an evaluation: {file} does not exist; give the `out` of `flowmask evaluate`")
    held = read_object(file)
    if not {"videos", "expressions", "per_expression", "weights"} <= held.keys():
        raise ConfigError(f"{file} is not a scores.json of an evaluation, or is damaged; evaluate again")
    try:
        scores = validated(held["per_expression"], dict[str, dict[str, float]])
        ids = validated(held.get("ids", {}), dict[str, Pair])
        empty = validated(held.get("left_empty", {}), dict[str, bool])
        pairs = {key: ids.get(key) or _pair(key) for key in {**scores, **empty}}
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}); evaluate again") from None
    if not scores:
        raise ConfigError(f"{file} holds no score: its dataset has no masks; nothing can be compared")
    by_pair = {pairs[key]: values for key, values in scores.items()}
    left_empty = {pairs[key]: value for key, value in empty.items()}
    keys = {pair: key for key, pair in pairs.items()}
    return Evaluated(path, file.parent, by_pair, keys, left_empty, _data_of(file.parent))


def dataset_of(evaluations: Sequence[Evaluated]) -> tuple[Found, str]:
    """The expressions of the first dataset that can be read; otherwise a sentence with the reason."""
    why = "no config.yaml lies beside the scores"
    for evaluation in evaluations:
        if evaluation.data is not None:
            try:
                videos = open_source(evaluation.data).videos()
                return {(v.video_id, e.exp_id): (v, e) for v in videos for e in v.expressions}, ""
            except (UserError, OSError) as error:
                why = str(error)
    return {}, f"Sentences and pictures are not shown: the dataset is out of reach ({why})."


def _pair(key: str) -> Pair:
    video, _, expression = key.partition("/")
    if "/" in expression or not {video, expression}.isdisjoint(("", ".", "..")):
        raise ValueError(f"{key!r} is not <video>/<expression>")
    return video, expression


def _data_of(folder: Path) -> DataSourceConfig | None:
    try:
        config: Any = read_yaml(folder / CONFIG)
        return DataSourceConfig.model_validate(config["data"]) if isinstance(config, Mapping) else None
    except (OSError, ValueError, LookupError):
        return None
