"""The contract of a metric: what it compares, per frame or per set, how it adds up, and where it is shown."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Place = Literal["report", "progress", "validation"]


class Metric(ABC):
    """One number about predicted masks; a class of PerFrame, PerSet or Combined.

    title: as people write it; unit: of the value, shown unless it is a percentage; order: in tables, the lowest first
    shown: where besides scores.json; as `eval_<name>` of a validation it is in MLflow too
    """

    title: ClassVar[str]
    unit: ClassVar[str] = "%"
    order: ClassVar[int] = 100
    shown: ClassVar[frozenset[Place]] = frozenset({"report", "progress", "validation"})

    def say(self, value: float) -> str:
        """The value as a table shows it."""
        return f"{value:.1f}" if self.unit == "%" else f"{value:.3g} {self.unit}".rstrip()


class PerFrame(Metric):
    """Measured on each frame; means over frames, then over expressions."""

    scale: ClassVar[float] = 100

    @abstractmethod
    def frame(self, truth: Mask, predicted: Mask) -> float:
        """Of two bool [H W]; `scale` takes it to the unit."""

    def expression(self, frames: Sequence[float]) -> float:
        """Over the frames of one expression."""
        return self.scale * float(np.mean(frames))


class PerSet(Metric):
    """A function of sums over every frame of every expression, as an overall IoU is."""

    @abstractmethod
    def frame(self, truth: Mask, predicted: Mask) -> Sequence[float]:
        """What two bool [H W] add to the sums."""

    @abstractmethod
    def value(self, sums: Sequence[float]) -> float:
        """The value of the sums, in the unit."""

    def expression(self, frames: Sequence[Sequence[float]]) -> float:
        """As if the expression were the whole set."""
        return self.value(np.sum(frames, axis=0).tolist())


class Combined(Metric):
    """Made of other metrics of the same expression; means over expressions."""

    @abstractmethod
    def of(self, scores: Mapping[str, float]) -> float:
        """From the measured scores by name."""
