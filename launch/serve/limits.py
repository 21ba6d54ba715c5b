"""The limits of the page; each refusal is one line with the value and the maximum."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowmask.models.errors import UserError
from flowmask.trainer.predict.input_video import InputVideo

MIB = 2**20
FORM_BYTES = 2**18  # of a request without its clip: sentences, and the boundaries and names of the form
_CHARACTERS = 300  # of a sentence; the text encoder reads at most 512 tokens of it
_PIXELS = 4096 * 2304  # of a frame: 16 such frames take 450 MB
_FRAMES_A_SECOND = 60  # a file may state any rate, so its frames are counted too
_KEPT = 20  # uploads and results together may have the size of this many of the largest clips


class LimitError(UserError):
    """A request above a limit of the page, or one that it can't process."""


@dataclass(frozen=True)
class Limits:
    """The maxima.

    megabytes: MiB of an upload
    seconds:   of a clip
    sentences: of a request
    waiting:   requests that wait for their turn
    """

    megabytes: int = 100
    seconds: float = 60.0
    sentences: int = 8
    waiting: int = 8

    @property
    def kept_bytes(self) -> int:
        """Largest size of all uploads and results together."""
        return _KEPT * self.megabytes * MIB

    def said(self) -> str:
        """The limits in one line, for the page."""
        clip = f"a clip of up to {self.seconds:g} s and {self.megabytes} MB"
        return f"{clip}, and up to {self.sentences} sentences of up to {_CHARACTERS} characters"

    def refuse_body(self, length: int | None, *, upload: bool) -> None:
        """Raises LimitError for the body of a request that is too large or has no stated size."""
        if length is None:
            raise LimitError("a request must state its size (Content-Length)")
        if upload and length > self.megabytes * MIB + FORM_BYTES:
            said = f"the clip has {length / MIB:.1f} MB; at most {self.megabytes} MB are accepted"
            raise LimitError(f"{said}: upload a smaller one")
        if not upload and length > FORM_BYTES:
            raise LimitError(f"the request has {length} bytes; at most {FORM_BYTES} are accepted")

    def sentences_in(self, text: str) -> list[str]:
        """The sentences of a text, one per line, without duplicates. LimitError for none, too many or too long ones."""
        lines = (line.strip() for line in text.splitlines())
        sentences = list(dict.fromkeys(line for line in lines if line))
        if not sentences:
            raise LimitError(
                'there is no sentence; type what to find, such as "the red car", one sentence on each line'
            )
        if len(sentences) > self.sentences:
            raise LimitError(
                f"there are {len(sentences)} sentences; at most {self.sentences} are accepted: remove some"
            )
        if long := [sentence for sentence in sentences if len(sentence) > _CHARACTERS]:
            line = f'the sentence "{long[0][:40]}..." has {len(long[0])} characters'
            raise LimitError(f"{line}; at most {_CHARACTERS} are accepted: shorten it")
        return sentences

    def clip(self, path: Path) -> str:
        """A short description of a clip. Raises LimitError if it is not a video, too long or too large."""
        video = InputVideo(path)
        height, width = video.size
        frames = len(video.frame_names)
        if height * width > _PIXELS:
            most = f"{_PIXELS / 1e6:.1f} megapixels"
            raise LimitError(
                f"the frames of the clip are {width}x{height} px; at most {most} are accepted: scale it down"
            )
        seconds = frames / video.fps
        if seconds > self.seconds:
            raise LimitError(f"the clip is {seconds:.1f} s long; at most {self.seconds:g} s are accepted: shorten it")
        if frames > self.seconds * _FRAMES_A_SECOND:
            most = f"{self.seconds * _FRAMES_A_SECOND:.0f}"
            raise LimitError(f"the clip has {frames} frames; at most {most} are accepted: shorten it")
        return f"{width}x{height} px, {frames} frames, {seconds:.1f} s"


def shown_frames(frames: Sequence[str], most: int) -> list[str]:
    """Up to `most` frames, evenly spread from the first to the last."""
    if len(frames) <= most:
        return list(frames)
    return [frames[round(i * (len(frames) - 1) / (most - 1))] for i in range(most)]
