"""The cost of a view of a cache: counted exactly when the plan is written, in hours by the speed of a warm-up."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowmask.data_pipeline.clip.clips import Clip

_LATENT_CHANNELS, _SPACE, _TIME = 16, 8, 4
_MIB, _GIB = 2**20, 2**30


@dataclass
class ViewCost:
    """Counts of one view, empty masks included."""

    clips: int = 0
    passes: int = 0  # through the VAE's encoder: one per video, one per mask
    pixels: int = 0  # frames x height x width of all passes
    latent_values: int = 0
    sentences: int = 0  # stored embeddings

    def add(self, clip: "Clip", texts: Sequence[int]) -> None:
        width, height = clip.geometry.size
        frames, masks = len(clip.frame_ids), len(clip.masks)
        encoded = 1 + sum(bool(anno_ids) for anno_ids in clip.masks)  # the empty mask is encoded once for all
        cells = (1 + (frames - 1) // _TIME) * (height // _SPACE) * (width // _SPACE)
        self.clips += 1
        self.passes += encoded
        self.pixels += encoded * frames * height * width
        self.latent_values += (2 + masks) * _LATENT_CHANNELS * cells
        self.sentences += len(set(texts))


@dataclass(frozen=True)
class BuildSpeed:
    """The measured speed of one worker in the warm-up."""

    pixels_per_s: float
    sentence_s: float
    sentence_bytes: float


def describe(views: Sequence[ViewCost], speed: BuildSpeed, *, texts: int, value_bytes: int, workers: int) -> str:
    """One line: bytes, encoder passes and estimated hours of a view and of all views.

    texts: distinct sentences of the whole build, each encoded once.
    """
    stored = [view.latent_values * value_bytes + view.sentences * speed.sentence_bytes for view in views]
    hours = [view.pixels / speed.pixels_per_s / workers / 3600 for view in views]
    text_hours = texts * speed.sentence_s / workers / 3600
    count, crew = len(views), f"{workers} worker{'s' if workers > 1 else ''}"
    mean = ViewCost(*(sum(vars(view)[name] for view in views) // count for name in vars(views[0])))
    line = (
        f"cost per view: {mean.clips:,} clips, {mean.passes:,} encoder passes, {_size(sum(stored) / count)}, "
        f"about {_hours(sum(hours) / count)} on {crew}"
    )
    total = f"; {texts:,} sentences, once: about {_hours(text_hours)}"
    if count == 1:
        return line + total
    return f"{line}; {count} views: {_size(sum(stored))}, about {_hours(sum(hours))}{total}"


def _size(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours:.2g} h ({hours * 3600:.0f} s)"
