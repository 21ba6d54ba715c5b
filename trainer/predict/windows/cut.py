"""Cuts a long video into windows of frames; imports no torch.

    window.frames=13 window.overlap=4, 21 frames: the latent frames of both windows
    0  1-4  5-8  9-12
              8  9-12  13-16  17-20

A window is a separate clip: its first latent frame is its first frame, every other one is four frames. It begins at
the last frame of a latent frame of the previous window, so latent frames in the overlap cover the same frames.
"""

from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from flowmask.models.config import Section
from flowmask.models.errors import ConfigError

LONGEST = 4 * 1023 + 1  # Wan2.1 has rotary positions for 1,024 latent frames
SHORTEST = 5
WHOLE_UP_TO, FRAMES, OVERLAP = 121, 81, 16  # defaults


class WindowConfig(Section):
    """How a long video is cut; each window is sampled with its neighbours' frames, and their logits are blended."""

    frames: int | None = Field(
        None, description="frames of a window, 4k + 1: memory depends only on this; null: the whole video"
    )
    overlap: int = Field(
        OVERLAP, description="frames that two windows share, without the first of the later one; a multiple of 4"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.frames is not None:
            _refuse("frames", self.frames, rule="4k + 1", among=range(SHORTEST, LONGEST + 1, 4))
        rule = "a multiple of 4" if self.frames is None else f"a multiple of 4, below window.frames={self.frames} - 4"
        _refuse("overlap", self.overlap, rule=rule, among=range(0, (self.frames or LONGEST) - SHORTEST + 1, 4))
        return self


def _refuse(name: str, value: int, *, rule: str, among: range) -> None:
    if value in among:
        return
    low = value - (value - among[0]) % 4
    nearest = [near for near in (low, low + 4) if near in among] or [min(max(value, among[0]), among[-1])]
    said = " or ".join(map(str, nearest))
    raise ConfigError(f"window.{name} is {value}; it must be {rule}, {among[0]} to {among[-1]}. Nearest: {said}")


def window_for(total: int, asked: WindowConfig) -> WindowConfig:
    """The window of a prediction: without `frames`, the whole video if it is short."""
    if asked.frames is not None or total <= WHOLE_UP_TO:
        return asked
    return WindowConfig(frames=FRAMES, overlap=asked.overlap)


@dataclass(frozen=True)
class TimeWindow:
    """frames: of the video; final: those that no later window contains; total: number of the video's frames."""

    frames: range
    final: range
    total: int

    @property
    def is_last(self) -> bool:
        return self.final.stop == self.total

    @property
    def share(self) -> float:
        """The share of the video that becomes final with this window."""
        return len(self.final) / self.total


def cut(total: int, window: WindowConfig) -> list[TimeWindow]:
    """The windows of a video of `total` frames, in order; all have one length, so the last one overlaps more.

    Raises ConfigError if one window is longer than the model's positions.
    """
    length = min(window.frames or total, total)
    if length > LONGEST:
        raise ConfigError(
            f"a video of {total} frames is longer than the model's maximum {LONGEST}; set window.frames={FRAMES} "
            f"window.overlap={OVERLAP}"
        )
    last = -(-(total - length) // 4) * 4
    starts = [0] if last == 0 else [*range(0, last, length - 1 - window.overlap), last]
    ends = [*starts[1:], total]
    return [TimeWindow(range(a, min(a + length, total)), range(a, end), total) for a, end in zip(starts, ends)]
