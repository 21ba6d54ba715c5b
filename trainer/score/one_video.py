"""One video from its frames to its record: read, encode, sample each sentence, write its masks, score them.

Knows no folder of an evaluation, no weights' file and no other video: whoever has something that segments, and a place
for masks, gets the record.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.clip.pixels import PixelNorm
from flowmask.data_pipeline.config import FrameBox
from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.trainer.predict.inference import MaskPiece, VaeClip, chunks, masks_of, read_clip
from flowmask.trainer.score.judging import Judge, score_decoder
from flowmask.trainer.score.mask_places import MaskPlace
from flowmask.trainer.score.protocols.base import BenchmarkProtocol

Record = dict[str, Any]


class VideoSegmenter(Protocol):
    """Weights that make masks, such as `LoadedSegmenter`."""

    @property
    def box(self) -> FrameBox:
        """The box of the training's frames."""

    @property
    def pixel_norm(self) -> PixelNorm: ...

    def encode(self, clip: VaeClip) -> Tensor:
        """Video latent [1 16 f h w] norm."""

    def logits(self, video_latent: Tensor, sentences: Sequence[str]) -> Iterator[Tensor]:
        """Logits [F H W] of each sentence, padding frames too."""

    def round_trip(self, masks: NDArray[np.bool_]) -> Tensor:
        """Masks bool [F H W] of a clip's size -> logits [4k+1 H W]: through the VAE and the decoder alone."""


@dataclass(frozen=True)
class VideoSettings:
    """How each video is evaluated; the fields are those of `EvaluateConfig`."""

    box: FrameBox | None = None
    sentences_per_batch: int = 4
    shuffled_text: bool = False
    decoder_score: bool = False
    seed: int = 0


class OneVideo:
    """A video whose sentences are answered one by one, until its record is whole."""

    def __init__(
        self,
        settings: VideoSettings,
        video: Video,
        places: Mapping[str, MaskPlace],
        *,
        protocol: BenchmarkProtocol | None = None,
        labels: Path,
    ) -> None:
        """places: where the masks of each expression id go.

        labels: a folder that is not there yet, for label maps of a protocol that makes some
        """
        self.settings, self.video, self._places, self._protocol = settings, video, places, protocol
        self._listener = None if protocol is None else protocol.listener(video, labels)
        self._judge = Judge(video, places)
        self._entries: dict[str, Record] = {}

    def read(self, loaded: VideoSegmenter) -> VaeClip:
        """All frames as one clip."""
        box = self.settings.box or loaded.box
        return read_clip(self.video, range(len(self.video.frame_names)), box=box, pixel_norm=loaded.pixel_norm)

    def sentences(self, loaded: VideoSegmenter, video_latent: Tensor) -> Iterator[tuple[Expression, Tensor]]:
        """Each expression with its logits [F H W]."""
        for some in chunks(self.video.expressions, self.settings.sentences_per_batch):
            yield from zip(some, loaded.logits(video_latent, [expression.text for expression in some]))

    def answer(self, expression: Expression, logits: Tensor, clip: VaeClip) -> None:
        """Write the masks of one expression and score them against the true ones, if there are any."""
        if self._listener is not None:
            self._listener.hear(expression, logits, clip)
        entry = self._entries[expression.exp_id] = {"text": expression.text, "answered": False}
        written = self._written(expression, entry, masks_of(logits, clip))
        if self.video.has_masks:
            self._judge.right(expression, entry, written)
        else:
            for _ in written:
                pass

    def record(self, loaded: VideoSegmenter, clip: VaeClip) -> Record:
        """The video's record, once every expression has its answer."""
        record: Record = {"frames": len(self.video.frame_names), "expressions": self._entries}
        if not self.video.has_masks:
            return record
        if self.settings.shuffled_text:
            self._judge.wrong(self._entries, seed=self.settings.seed)
        if self._protocol is not None:
            record["protocol"] = self._protocol.of_video(self.video, self._judge.answers, self._listener)
        if self.settings.decoder_score:
            score_decoder(loaded.round_trip, self.video, clip, self._entries)
        return record

    def _written(self, expression: Expression, entry: Record, pieces: Iterator[MaskPiece]) -> Iterator[MaskPiece]:
        """The pieces, each after it has been written."""
        names, place = self.video.frame_names, self._places[expression.exp_id]
        for ids, masks in pieces:
            entry["answered"] |= bool(masks.any())
            for i, mask in zip(ids, masks):
                place.write(names[i], mask)
            yield ids, masks


def evaluate_video(loaded: VideoSegmenter, one: OneVideo) -> Record:
    """Masks of every expression into its place; returns the video's record."""
    clip = one.read(loaded)
    for expression, logits in one.sentences(loaded, loaded.encode(clip)):
        one.answer(expression, logits, clip)
    return one.record(loaded, clip)
