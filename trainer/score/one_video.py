"""One video from its frames to its record: read, encode, sample each sentence, write its masks, score them.

A video of several windows is judged by its written masks, after the last window, when its presence is known.

Independent of the evaluation's folder, of weight files and of other videos: it needs a segmenter and a place for masks,
and returns the record.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.clip.pixels import PixelNorm
from flowmask.data_pipeline.clip.vae_clip import VaeClip
from flowmask.data_pipeline.config import FrameBox
from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.trainer.predict.inference import MaskPiece
from flowmask.trainer.predict.presence import Presence, emptied
from flowmask.trainer.predict.windows.clips import Stitched, final_masks, final_part, window_clips
from flowmask.trainer.predict.windows.cut import TimeWindow, WindowConfig, cut
from flowmask.trainer.score.judging import Judge, decoder_tallies, note, stored
from flowmask.trainer.score.mask_places import MaskPlace
from flowmask.trainer.score.metrics import Tally
from flowmask.trainer.score.protocols.base import BenchmarkProtocol

Record = dict[str, Any]
_WHOLE = WindowConfig()


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
        """Logits [F H W] of each sentence, with padding frames."""

    def round_trip(self, masks: NDArray[np.bool_]) -> Tensor:
        """Masks bool [F H W] of a clip's size -> logits [4k+1 H W]: only through the VAE and the decoder."""


@dataclass(frozen=True)
class VideoSettings:
    """The settings of a video's evaluation; the fields are those of `EvaluateConfig`."""

    box: FrameBox | None = None
    shuffled_text: bool = False
    decoder_score: bool = False
    seed: int = 0
    window: WindowConfig = _WHOLE


def sentences_of(video: Video, loaded: VideoSegmenter, video_latent: Tensor) -> Iterator[tuple[Expression, Tensor]]:
    """Each expression with its logits [F H W]; equal sentences follow each other and share the logits."""
    alike: dict[str, list[Expression]] = {}
    for expression in video.expressions:
        alike.setdefault(expression.text, []).append(expression)
    for expressions, logits in zip(alike.values(), loaded.logits(video_latent, list(alike))):
        for expression in expressions:
            yield expression, logits


class OneVideo:
    """A video with its sentences, answered one by one, window after window, until its record is complete.

    In one window `answer` may be called in any order and by several threads at once; `record` after all of them.
    """

    def __init__(
        self,
        settings: VideoSettings,
        video: Video,
        places: Mapping[str, MaskPlace],
        *,
        protocol: BenchmarkProtocol | None = None,
        labels: Path,
        chosen: Presence | None = None,
    ) -> None:
        """places: the storage of the masks of each expression id.

        labels: a folder that does not exist yet, for the label maps of a protocol that makes some
        chosen: the presence threshold, if there is one
        """
        self._chosen = chosen
        self.settings, self.video, self._places, self._protocol = settings, video, places, protocol
        self._listener = None if protocol is None else protocol.listener(video, labels)
        self.windows = cut(len(video.frame_names), settings.window)
        self._answers = {expression.exp_id: Stitched() for expression in video.expressions}
        self._judge = Judge(video, places)
        self._entries: dict[str, Record] = {}
        self._ceilings: Mapping[str, Tally] = {}
        self._hearing = threading.Lock()

    def read(self, loaded: VideoSegmenter) -> Iterator[tuple[TimeWindow, VaeClip]]:
        """The clip of each window, one after another."""
        box = self.settings.box or loaded.box
        return window_clips(self.video, self.windows, box=box, pixel_norm=loaded.pixel_norm)

    def sentences(self, loaded: VideoSegmenter, video_latent: Tensor) -> Iterator[tuple[Expression, Tensor]]:
        """Each expression with its logits [F H W], as `sentences_of`; video_latent: [1 16 f h w] norm."""
        return sentences_of(self.video, loaded, video_latent)

    def answer(
        self, expression: Expression, logits: Tensor, clip: VaeClip, *, window: TimeWindow | None = None
    ) -> None:
        """Write the masks of one expression that become final with a window; after the last one, score them.

        logits: [F H W] at the clip's size, with its padding    window: None: the only one
        """
        window, answer = window or self.windows[0], self._answers[expression.exp_id]
        entry = self._entries.setdefault(expression.exp_id, {"text": expression.text, "answered": False})
        logits = answer.add(window, logits)
        entry["presence"] = answer.presence
        if len(self.windows) == 1:
            logits = emptied(logits, answer.presence, self._chosen)
            if self._listener is not None:
                with self._hearing:
                    self._listener.hear(expression, logits, final_part(window, clip))
            self._end(expression, entry, self._written(expression, entry, final_masks(window, logits, clip)))
            return
        for _ in self._written(expression, entry, final_masks(window, logits, clip)):
            pass
        if window.is_last:
            again = stored(self.video, self._places[expression.exp_id])
            if self._chosen is not None and answer.presence < self._chosen.threshold:
                entry["answered"] = False
                again = self._written(expression, entry, ((ids, np.zeros_like(masks)) for ids, masks in again))
            elif not self.video.has_masks:
                return
            self._end(expression, entry, again)

    def _end(self, expression: Expression, entry: Record, masks: Iterator[MaskPiece]) -> None:
        """Collect the masks of the whole video, and score them against the true ones, if there are any."""
        if self.video.has_masks:
            self._judge.right(expression, entry, masks)
        for _ in masks:
            pass

    def decode_truth(self, loaded: VideoSegmenter, clip: VaeClip) -> None:
        """Score the true masks after the VAE and the decoder, if requested; needs no answer.

        clip: of any window
        """
        if self.video.has_masks and self.settings.decoder_score:
            self._ceilings = decoder_tallies(loaded.round_trip, self.video, self.windows, clip)

    def record(self) -> Record:
        """The video's record, once every expression has its answer."""
        entries = {expression.exp_id: self._entries[expression.exp_id] for expression in self.video.expressions}
        record: Record = {"frames": len(self.video.frame_names), "expressions": entries}
        if not self.video.has_masks:
            return record
        if self.settings.shuffled_text:
            self._judge.wrong(self._entries, seed=self.settings.seed)
        if self._protocol is not None:
            answers = [self._judge.answers[exp_id] for exp_id in entries]
            record["protocol"] = self._protocol.of_video(self.video, answers, self._listener)
        for exp_id, tally in self._ceilings.items():
            note(entries[exp_id], "decoder", tally)
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
    """Write the masks of every expression to its place; returns the video's record."""
    for window, clip in one.read(loaded):
        for expression, logits in one.sentences(loaded, loaded.encode(clip)):
            one.answer(expression, logits, clip, window=window)
    one.decode_truth(loaded, clip)
    return one.record()
