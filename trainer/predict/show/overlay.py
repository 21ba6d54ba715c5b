"""Overlays: videos under coloured masks, a legend of the prompts, mask PNGs.

Works frame by frame, so a video of any length needs the memory of one frame.
"""

import colorsys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flowmask.data_pipeline.show.paint import Rgb, paint

if TYPE_CHECKING:
    from flowmask.data_pipeline.video.sound import Soundtrack

SHORT_SIDE_PX = 480  # smaller videos are enlarged, so that the legend is readable
LONG_SIDE_PX = 1920  # larger ones are reduced: hardware H.264 decoders support up to about 4096
_PALETTE: tuple[Rgb, ...] = (  # Okabe and Ito's colours, distinguishable also for colour-blind people
    (230, 97, 0),
    (34, 160, 230),
    (0, 178, 130),
    (240, 228, 66),
    (214, 90, 170),
    (0, 104, 190),
    (250, 170, 30),
)
_LONGEST_TEXT, _NO_LETTER = 1000, "\U0010fffe"
_STRIP, _INK = (18, 18, 22), (238, 238, 242)


def colour(number: int) -> Rgb:
    """The colour of prompt `number`: distinct hues, without limit."""
    if number < len(_PALETTE):
        return _PALETTE[number]
    r, g, b = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, 0.95)
    return round(255 * r), round(255 * g), round(255 * b)


@lru_cache
def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans if installed (prompts in any script), else PIL's own font."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size_px)
    except OSError:
        return ImageFont.load_default(size_px)


def legend_text(text: str, *, instead: str) -> str:
    """A sentence for a legend, or `instead` if the font lacks one of its characters."""
    return text if all(map(_is_drawn, set(text[:_LONGEST_TEXT]))) else instead


@lru_cache(maxsize=4096)
def _is_drawn(letter: str) -> bool:
    """Whether the font has a glyph for a character, and not only the box for missing ones."""
    face = font(16)
    try:
        return letter.isspace() or bytes(face.getmask(letter)) != bytes(face.getmask(_NO_LETTER))
    except UnicodeEncodeError:  # a bitmap font
        return False


def view_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which a video is shown: short side at least 480, long side at most 1920."""
    scale = max(1.0, SHORT_SIDE_PX / min(height, width))
    scale = min(scale, LONG_SIDE_PX / max(height, width))
    return max(2, round(height * scale)), max(2, round(width * scale))


def wrap(text: str, *, width_px: int, size_px: int, lines: int) -> list[str]:
    """Break a sentence into at most `lines` lines of at most `width_px`; the rest becomes an ellipsis."""
    face, rest, broken = font(size_px), " ".join(text[:_LONGEST_TEXT].split()), list[str]()
    while rest:
        fit = len(rest)
        while fit > 1 and face.getlength(rest[:fit]) > width_px:
            fit -= 1
        if fit < len(rest) and " " in rest[: fit + 1]:
            fit = rest[: fit + 1].rindex(" ")
        broken.append(rest[:fit])
        rest = rest[fit:].lstrip()
    if len(broken) > lines:
        last = broken[lines - 1]
        while last and face.getlength(last + "…") > width_px:
            last = last[:-1]
        broken = [*broken[: lines - 1], last.rstrip() + "…"]
    return broken


def legend(prompts: Sequence[tuple[str, Rgb]], *, width: int) -> NDArray[np.uint8]:
    """A strip to place below a frame: a swatch of each prompt's colour and its sentence.

    returns: uint8 [height width 3]; its height fits the wrapped sentences, 0 without any
    """
    if not prompts:
        return np.zeros((0, width, 3), dtype=np.uint8)
    size_px = min(40, max(16, width // 36))
    line_px, gap = round(size_px * 1.35), max(4, size_px // 2)
    text_left = gap + size_px + gap
    room = max(size_px, width - text_left - gap)
    lines_each = 3 if len(prompts) <= 6 else 1
    blocks = [(wrap(text, width_px=room, size_px=size_px, lines=lines_each), tone) for text, tone in prompts]
    height = gap + sum(len(lines) * line_px + gap // 2 for lines, _ in blocks) + gap // 2
    strip = Image.new("RGB", (width, height), _STRIP)
    draw, top = ImageDraw.Draw(strip), gap
    for lines, tone in blocks:
        y = top + (line_px - size_px) // 2
        draw.rounded_rectangle((gap, y, gap + size_px, y + size_px), size_px // 5, fill=tone)
        for line in lines:
            draw.text((text_left, top + line_px // 2), line, fill=_INK, font=font(size_px), anchor="lm")
            top += line_px
        top += gap // 2
    return np.asarray(strip)


def write_mask(path: Path, mask: NDArray[np.bool_]) -> None:
    """Write bool [H W] as an 8-bit grey PNG of 0 and 255: the format that the MeViS server accepts."""
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(path, format="PNG")


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Read a file of `write_mask`: bool [H W]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L")) > 127


class OverlayVideo:
    """One mp4 of a video under coloured masks, a legend below; `with` writes it completely or not at all."""

    def __init__(
        self,
        path: Path,
        *,
        prompts: Sequence[tuple[str, Rgb]],
        height: int,
        width: int,
        fps: float,
        sound: "Soundtrack | None" = None,
    ) -> None:
        """height, width: of the frames to come; fps: frames per second, also fractions such as 29.97.

        sound: sound from the first frame to the last
        """
        from flowmask.data_pipeline.video.writing import VideoWriter  # imports PyAV, which a rank may not need

        self._tones = [tone for _, tone in prompts]
        self._size = view_size(height, width)
        self._strip = legend(prompts, width=self._size[1])
        high, wide = self._size[0] + self._strip.shape[0], self._size[1]
        self._video = VideoWriter(path, height=high, width=wide, fps=fps, sound=sound)

    @property
    def sound_problem(self) -> str:
        """Why a part of the sound is missing; "" if none is."""
        return self._video.sound_problem

    def add(self, frame: NDArray[np.uint8], masks: Iterable[NDArray[np.bool_]]) -> None:
        """Append one frame: uint8 [H W 3] and one bool [H W] for each prompt, in the order of the prompts."""
        picture = paint(frame, list(zip(masks, self._tones, strict=True)), size=self._size)
        self._video.add(np.concatenate([picture, self._strip]))

    def __enter__(self) -> Self:
        self._video.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._video.__exit__(kind, error, at)
