"""Whether a video contains the object of a sentence: a number from its logits, and a threshold below which masks are
empty.

Only `presence_of` implements the rule. A threshold belongs to the weights, conventions, sampler and box with which it
was chosen; it is refused for others. It comes from a calibrated evaluation's scores.json, or from an export.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from flowmask.data_pipeline.config import DataSourceConfig, FrameBox
from flowmask.models.config import SamplerConfig, Section
from flowmask.models.errors import ConfigError, UserError, WeightsError
from flowmask.models.files import read_object
from flowmask.trainer.state.document import refuse_unlike

if TYPE_CHECKING:
    from torch import Tensor

KEY, NONE = "presence", "none"  # key in scores.json and in an export's settings; value for no threshold
RULE = "mean_positive_logit"
_SCORES = "scores.json"
_NO_MASK = -100.0  # a logit of probability 0


def presence_of(logits: "Tensor", *, frames: int) -> float:
    """Unclamped logits [F H W] at a clip's size, F >= frames -> the mean of max(logit, 0) over all pixels.

    Never negative, and 0 only for an empty mask; frames after `frames` are padding. The number of a video with several
    windows is the mean of the numbers of their final frames, weighted by the count of these frames.
    """
    import torch

    return float(logits[:frames].clamp(min=0).mean(dtype=torch.float64))


class Calibration(Section):
    """The sentences on which a threshold was chosen, and its accuracy on them, in percent."""

    source: str
    split: str
    sentences: int
    no_target: int
    n_acc: float
    t_acc: float

    def is_of(self, data: DataSourceConfig) -> bool:
        """Whether it was on a dataset and split with these names; other videos may have the same names."""
        return (self.source, self.split) == (data.source, data.split)


class Presence(Section):
    """A threshold, and its range of use. weights, conventions: as in `LoadedSegmenter`."""

    rule: str
    threshold: float = Field(ge=0)
    weights: dict[str, str]
    conventions: dict[str, str | int | bool]
    sampler: SamplerConfig
    box: FrameBox
    calibration: Calibration

    def decides(self) -> dict[str, Any]:
        """The fields that change masks, for a fingerprint."""
        return {"rule": self.rule, "threshold": self.threshold}

    def said(self) -> str:
        """The threshold and its origin, for a person."""
        on = self.calibration
        return (
            f"{self.threshold:.4g} ({self.rule}), chosen on {on.sentences} sentences of {on.source} {on.split}, "
            f"{on.no_target} of them without a target: N-acc {on.n_acc:.1f}, T-acc {on.t_acc:.1f} there"
        )

    def refuse_other(self, there: "Presence", *, name: str) -> None:
        """Raises ConfigError if `there`, called `name`, belongs to other settings or another rule."""
        ours, others = _belongings(self) | {"rule": RULE}, _belongings(there)
        differ = [
            f"{key} {others.get(key)} there, {value} here" for key, value in ours.items() if others.get(key) != value
        ]
        if differ:
            raise ConfigError(
                f"presence is from {name}, which was chosen for other settings: {'; '.join(differ)}. Choose one for "
                "these with flowmask evaluate --calibrate, or set presence=none (--presence none)"
            )


@dataclass(frozen=True)
class Judged:
    """One sentence: its presence, whether its masks have a pixel, whether it has a target."""

    presence: float
    answered: bool
    has_target: bool


def sweep(judged: Sequence[Judged]) -> tuple[float, float, float]:
    """The threshold with the largest mean of N-acc and T-acc, and N-acc and T-acc at it, in percent.

    The candidates are 0, which empties nothing, and the middle between each two neighbouring numbers; among equal ones
    the lowest wins. The largest number is never emptied. Sentences of both kinds are needed.
    """
    values = sorted({one.presence for one in judged})
    cuts = [0.0, *map(_between, values, values[1:])]
    kept, total = {}, {}
    for target in (False, True):
        said = sorted(one.presence for one in judged if one.has_target == target and one.answered)
        kept[target] = len(said) - np.searchsorted(said, cuts, side="left")
        total[target] = sum(one.has_target == target for one in judged)
    left = total[False] - kept[False]
    # integers, so that equal values compare equal
    best = int(np.argmax(left * total[True] + kept[True] * total[False]))
    return cuts[best], 100 * float(left[best] / total[False]), 100 * float(kept[True][best] / total[True])


def _between(low: float, high: float) -> float:
    middle = low + (high - low) / 2
    return middle if middle > low else high


def emptied(logits: "Tensor", seen: float, chosen: Presence | None) -> "Tensor":
    """Logits [F H W], or those of an empty mask if their presence `seen` is below the threshold."""
    absent = chosen is not None and seen < chosen.threshold
    import torch

    return torch.full_like(logits, _NO_MASK) if absent else logits


def stated(asked: str | None, baked: Presence | None) -> Presence | None:
    """The threshold of an evaluation's folder `asked`; None: the one stored with the weights; "none": no threshold."""
    if asked == NONE:
        return None
    return baked if asked is None else read_presence(asked)


def in_use(
    asked: str | None,
    baked: Presence | None,
    *,
    checkpoint: str,
    weights: Mapping[str, str],
    conventions: Mapping[str, str | int | bool],
    sampler: SamplerConfig,
    box: FrameBox | None,
    say: Callable[[str], None],
) -> Presence | None:
    """The threshold of `stated`, if it was chosen for these weights, conventions, sampler and box; else ConfigError.

    box: None: the one with which it was chosen. say: receives the message that a threshold will empty masks
    """
    found = stated(asked, baked)
    if found is None:
        return None
    here = {"weights": dict(weights), "conventions": conventions, "sampler": sampler, "box": box or found.box}
    found.model_copy(update=here).refuse_other(found, name=asked or checkpoint)
    keeping = "; presence=none (--presence none) keeps all masks" if asked is None else ""
    say(f"{asked or checkpoint}: presence threshold {found.said()}{keeping}")
    return found


def read_presence(asked: str) -> Presence:
    """The threshold that an evaluation used; raises ConfigError if there is none."""
    path = Path(asked)
    file = path / _SCORES if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"presence is {asked}, but {file} does not exist; give the out of a calibrated evaluation")
    found = presence_in(read_object(file), where=file, error=ConfigError)
    if found is None:
        raise ConfigError(f"presence is {asked}, which has no threshold; make it with flowmask evaluate --calibrate")
    return found


def presence_in(
    settings: Mapping[str, Any], *, where: object, error: type[UserError] = WeightsError
) -> Presence | None:
    """The threshold among an export's settings or an evaluation's scores; raises `error` if it is damaged."""
    found = settings.get(KEY)
    if found is None:
        return None
    refuse_unlike(Presence, found, where=f"{where}: {KEY}", error=error)
    return Presence.model_validate(found)


def _belongings(chosen: Presence) -> dict[str, str]:
    """The settings that a threshold belongs to, as text."""
    box = chosen.box
    return {
        **{part: sha256[:12] for part, sha256 in sorted(chosen.weights.items())},
        **{name: str(value) for name, value in chosen.conventions.items()},
        "rule": chosen.rule,
        "sampler.steps": str(chosen.sampler.steps),
        "sampler.shift": str(chosen.sampler.shift),
        "box": f"{box.height_px}x{box.width_px} in multiples of {box.size_multiple}",
    }
