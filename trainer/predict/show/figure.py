"""A figure for a page: a row of frames of a video, with one sentence's mask over them and the sentence above."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flowmask.data_pipeline.show.paint import Rgb, outlined, paint
from flowmask.trainer.predict.show.overlay import font, legend_text, wrap

FRAMES = 6
_CELL = (400, 640)  # height and width in px of the box for a frame, in which contours are 2 px wide
_GAP, _MARGIN = 12, 30  # px
_CAPTION_PX, _LABEL_PX, _LINE = 40, 28, 1.35
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 24), (110, 110, 118)


def evenly(total: int) -> list[int]:
    """At most FRAMES of the numbers below `total`, evenly spaced, the first and the last among them."""
    count = min(FRAMES, total)
    return [0] if count == 1 else [round(place * (total - 1) / (count - 1)) for place in range(count)]


class FigureStrip:
    """One PNG; the frames are given one by one."""

    def __init__(self, sentence: str, tone: Rgb, *, height: int, width: int) -> None:
        """height, width: of the frames to come."""
        scale = min(_CELL[0] / height, _CELL[1] / width)
        self._size = max(1, round(height * scale)), max(1, round(width * scale))
        self._sentence, self._tone = sentence, tone
        self._cells: list[tuple[NDArray[np.uint8], str]] = []

    def add(self, frame: NDArray[np.uint8], mask: NDArray[np.bool_], label: str) -> None:
        """Append a frame: uint8 [H W 3], its mask bool [H W], and the label below it."""
        label = legend_text(label, instead=f"frame {len(self._cells) + 1}")
        painted = paint(frame, [(mask, self._tone)], size=self._size)
        self._cells.append((outlined(painted, mask, self._tone), label))  # a contour without fill is faint on paper

    def save(self, path: Path) -> None:
        """Write the figure."""
        high, wide = self._size
        across = len(self._cells) * (wide + _GAP) - _GAP
        left = _MARGIN + _CAPTION_PX + _GAP + _GAP // 2
        lines = wrap(self._sentence, width_px=max(wide, across - left + _MARGIN), size_px=_CAPTION_PX, lines=3)
        top = _MARGIN + round(len(lines) * _CAPTION_PX * _LINE) + _GAP
        below = round(_LABEL_PX * _LINE) + _GAP // 2
        sheet = Image.new("RGB", (across + 2 * _MARGIN, top + high + below + _MARGIN - _GAP), _PAPER)
        draw = ImageDraw.Draw(sheet)
        self._caption(draw, lines, left=left)
        for place, (picture, label) in enumerate(self._cells):
            x = _MARGIN + place * (wide + _GAP)
            sheet.paste(Image.fromarray(picture), (x, top))
            middle = (x + wide // 2, top + high + below // 2)
            shown = wrap(label, width_px=wide, size_px=_LABEL_PX, lines=1)
            draw.text(middle, shown[0], fill=_FAINT, font=font(_LABEL_PX), anchor="mm")
        sheet.save(path, format="PNG")

    def _caption(self, draw: ImageDraw.ImageDraw, lines: Sequence[str], *, left: int) -> None:
        middle = _MARGIN + round(_CAPTION_PX * _LINE / 2)
        half = _CAPTION_PX // 2
        box = (_MARGIN, middle - half, _MARGIN + 2 * half, middle + half)
        draw.rounded_rectangle(box, _CAPTION_PX // 5, fill=self._tone)
        for number, line in enumerate(lines):
            at = (left, middle + round(number * _CAPTION_PX * _LINE))
            draw.text(at, line, fill=_INK, font=font(_CAPTION_PX), anchor="lm")
