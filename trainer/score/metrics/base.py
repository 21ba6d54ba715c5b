"""The contract of a metric: its inputs, per frame or per set, its averaging, and the places where it is shown."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Place = Literal["report", "progress", "validation"]


class Metric(ABC):
    """One number about predicted masks; a class of PerFrame, PerSet or Combined.

    title: name for display; unit: of the value, shown unless it is %; order: position in tables, lowest first
    shown: places in addition to scores.json; as `eval_<name>` of a validation it is also in MLflow
    """

    title: ClassVar[str]
    unit: ClassVar[str] = "%"
    order: ClassVar[int] = 100
    shown: ClassVar[frozenset[Place]] = frozenset({"report", "progress", "validation"})

    def say(self, value: float) -> str:
        """The value as text for a table."""
        return f"{value:.1f}" if self.unit == "%" else f"{value:.3g} {self.unit}".rstrip()


class Measured(Metric):
    """A metric computed from masks."""

    @abstractmethod
    def frame(self, truth: Mask, predicted: Mask) -> Any:
        """The score of one frame, from two bool [H W]; `expression` takes the scores of all frames."""

    @abstractmethod
    def expression(self, frames: Sequence[Any]) -> float:
        """The value of one expression from its frames, in the unit."""


class PerFrame(Measured):
    """`frame` returns a number, which `scale` converts to the unit; means over frames, then over expressions."""

    scale: ClassVar[float] = 100

    def expression(self, frames: Sequence[float]) -> float:
        return self.scale * float(np.mean(frames))


class PerSet(Measured):
    """A function of sums over every frame of every expression, such as an overall IoU; `frame` returns the summands."""

    @abstractmethod
    def value(self, sums: Sequence[float]) -> float:
        """The value of the sums, in the unit."""

    def expression(self, frames: Sequence[Sequence[float]]) -> float:
        return self.value(np.sum(frames, axis=0).tolist())


class Combined(Metric):
    """Computed from other metrics of the same expression; means over expressions."""

    @abstractmethod
    def of(self, scores: Mapping[str, float]) -> float:
        """The value, from the measured scores by name."""
