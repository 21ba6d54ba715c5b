"""The contract of a protocol: its part of a video's record, and the tables from all records.

Imports `data_pipeline.sources` and the metrics; torch only where types are checked.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.models.errors import ConfigError, DataError
from flowmask.trainer.score.metrics.base import Mask

if TYPE_CHECKING:
    from torch import Tensor

    from flowmask.data_pipeline.clip.vae_clip import VaeClip

JudgedPiece = tuple[Sequence[int], Mask, Mask]  # frame ids, truth and predicted, two bool [n H W]
Row = Mapping[str, float | None]
Table = Mapping[str, Row]  # group -> number by name, in percent


@dataclass(frozen=True)
class Answer:
    """The written masks of one sentence, in the frames that are annotated for it.

    answered: whether a mask has a pixel in any frame, annotated or not
    j, f:     fractions, of each annotated frame
    pieces:   reads all of these frames, some at a time, in order
    """

    expression: Expression
    answered: bool
    j: Sequence[float]
    f: Sequence[float]
    pieces: Callable[[], Iterator[JudgedPiece]]


class Listener(ABC):
    """Receives the logits of each sentence of one video, for a protocol that needs more than masks."""

    @abstractmethod
    def hear(self, expression: Expression, logits: "Tensor", clip: "VaeClip") -> None:
        """Logits [F H W] at the clip's size, with its padding frames."""


class BenchmarkProtocol(ABC):
    """How a benchmark scores. Subclass PerAnswer, or this class if the answers of a video are scored together.

    conventions: names of its tables, one for each scoring convention in use; the first is the default
    sources:     the layouts (`data.source`) that it scores
    """

    conventions: ClassVar[tuple[str, ...]]
    sources: ClassVar[tuple[str, ...]]

    def refuse_source(self, source: str, *, name: str) -> None:
        """Raises ConfigError for a layout that this protocol, called `name`, does not score."""
        if source not in self.sources:
            raise ConfigError(
                f"protocol is {name!r}, which scores data.source {' or '.join(self.sources)}, but data.source is "
                f"{source!r}; set protocol=null for J and F alone"
            )

    def refuse_video(self, video: Video, *, name: str) -> None:
        """Raises DataError for a video that this protocol, called `name`, cannot score; reads no frame."""
        if not video.has_masks:
            raise DataError(f"protocol is {name!r}, which needs true masks; {video} has none; set protocol=null")

    @property
    def hears(self) -> bool:
        """Whether it needs the logits of whole videos."""
        return type(self).listener is not BenchmarkProtocol.listener

    def listener(self, video: Video, folder: Path) -> Listener | None:
        """A listener to the logits of a video; None if the masks are enough.

        folder: for label maps, as <annotator>/<frame>.png: does not exist yet; published as labels/<video>/
        """
        return None

    @abstractmethod
    def of_video(self, video: Video, answers: Sequence[Answer], heard: Listener | None) -> dict[str, Any]:
        """The protocol's part of the video's record, ready for JSON; `answers` in the order of the video's expressions.

        heard: the listener of this video, after all sentences
        """

    @abstractmethod
    def overall(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
        """The table of each convention, from the results of `of_video` in the order of the videos."""


class PerAnswer(BenchmarkProtocol):
    """A protocol that scores each sentence separately; the record stores the numbers by expression id."""

    def of_video(self, video: Video, answers: Sequence[Answer], heard: Listener | None) -> dict[str, Any]:
        return {answer.expression.exp_id: self.of_answer(video, answer) for answer in answers}

    @abstractmethod
    def of_answer(self, video: Video, answer: Answer) -> dict[str, Any]:
        """The numbers of one sentence, ready for JSON."""

    def overall(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
        return self.tables([entry for record in records for entry in record.values()])

    @abstractmethod
    def tables(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
        """The table of each convention, from the results of `of_answer`, at least one."""


def refuse_other_kinds(video: Video, kinds: Sequence[str], *, name: str) -> None:
    """Raises DataError for a sentence of a kind that the protocol called `name` does not have."""
    for expression in video.expressions:
        if expression.kind not in kinds:
            raise DataError(
                f"protocol is {name!r}, which scores sentences of kind {', '.join(kinds)}; {video}: expression "
                f"{expression.exp_id} is of kind {expression.kind!r}; set protocol=null"
            )


def in_percent(row: Mapping[str, float | None]) -> dict[str, float | None]:
    """Fractions as percentages."""
    return {name: None if value is None else 100 * value for name, value in row.items()}
