"""Pictures for people: masks painted over frames, and frames as data addresses for a page.

Pure functions on uint8 [H W 3] rgb8 and bool [H W]; no files.
"""

import base64
import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Rgb = tuple[int, int, int]
TRUE_COLOUR: Rgb = (60, 190, 90)
PREDICTED_COLOUR: Rgb = (230, 97, 0)
CELL_PX = 160  # width of one picture of a contact sheet
STRIPE_PX = 3  # minimum
_FILL = 0.45
_DIM = 0.45


def paint(
    frame: NDArray[np.uint8], layers: Sequence[tuple[NDArray[np.bool_], Rgb]], *, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Masks as translucent colours with a solid contour over a frame.

    frame:   uint8 [H W 3] rgb8
    layers:  (bool [H W], colour) each; where several overlap, their fills and contours alternate in stripes;
             contours lie above all fills
    returns: uint8 [size 3], by default the frame's size; masks are enlarged without smoothing
    """
    size = size or (frame.shape[0], frame.shape[1])
    canvas = Image.fromarray(_resized(frame, size, Image.Resampling.BICUBIC))
    masks = [_resized(mask.astype(np.uint8), size, Image.Resampling.NEAREST).astype(bool) for mask, _ in layers]
    tones = [tone for _, tone in layers]
    for mask, tone in zip(_striped(masks, size), tones):
        canvas.paste(canvas.point(_tinted(tone)), mask=Image.fromarray(mask))
    contours = [_contour(mask, max(1, min(size) // 160)) for mask in masks]
    for contour, tone in zip(_striped(contours, size), tones):
        canvas.paste(tone, mask=Image.fromarray(contour))
    return np.array(canvas)


@lru_cache
def _tinted(tone: Rgb) -> list[int]:
    """The value of each of the 3 x 256 values of a pixel's channels under a fill."""
    values = np.arange(256, dtype=np.float32)
    return [round(float(value)) for channel in tone for value in (1 - _FILL) * values + _FILL * np.float32(channel)]


def lit(frame: NDArray[np.uint8], mask: NDArray[np.bool_], tone: Rgb) -> NDArray[np.uint8]:
    """A frame rgb8 [H W 3], dimmed outside of a mask bool [H W], tinted and outlined inside; in the size of a cell."""
    dimmed = np.where(mask[..., None], frame, (frame * _DIM).astype(np.uint8))
    return outlined(paint(dimmed, [(mask, tone)], size=_cell_size(frame)), mask, tone)


def outlined(picture: NDArray[np.uint8], mask: NDArray[np.bool_], tone: Rgb) -> NDArray[np.uint8]:
    """A picture rgb8 [H W 3] with the outline of a mask bool [H0 W0]: a light line inside and a black line outside.

    For every colour of the picture, one of the two lines has a contrast of 3 or more, by the formula of WCAG.
    """
    height, width = picture.shape[:2]
    inside = _resized(mask.astype(np.uint8), (height, width), Image.Resampling.NEAREST).astype(bool)
    thickness, drawn = max(1, min(height, width) // 160), picture.copy()
    drawn[_contour(~inside, thickness)] = 0
    drawn[_contour(inside, thickness)] = [(channel + 255) // 2 for channel in tone]
    return drawn


def embedded(picture: NDArray[np.uint8]) -> str:
    """A picture rgb8 [H W 3] as a data address: JPEG, in the width of a cell."""
    high, wide = _cell_size(picture)
    image = Image.fromarray(picture)
    if image.size != (wide, high):
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _striped(masks: Sequence[NDArray[np.bool_]], size: tuple[int, int]) -> list[NDArray[np.bool_]]:
    """The same masks without common pixels: where several overlap, each keeps diagonal stripes."""
    if len(masks) < 2:
        return list(masks)
    count = np.asarray(np.sum(masks, axis=0, dtype=np.int32))
    common = count > 1
    if not common.any():
        return list(masks)
    rows, columns = np.nonzero(common)
    turn = (rows + columns) // max(STRIPE_PX, min(size) // 48) % count[common]
    kept = []
    for mask in masks:
        here, alone = mask[common], mask.copy()
        alone[common] = here & (turn == 0)
        turn -= here  # shifts the next mask's stripes by one
        kept.append(alone)
    return kept


def _cell_size(frame: NDArray[np.uint8]) -> tuple[int, int]:
    return max(1, round(frame.shape[0] * CELL_PX / frame.shape[1])), CELL_PX


def _resized(image: NDArray[np.uint8], size: tuple[int, int], how: Image.Resampling) -> NDArray[np.uint8]:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), how))


def _contour(mask: NDArray[np.bool_], thickness_px: int) -> NDArray[np.bool_]:
    """The pixels of a mask that are at most `thickness_px` from its outside, along rows and columns."""
    inside = mask
    for _ in range(thickness_px):
        ringed = np.pad(inside, 1, constant_values=True)  # the frame's border is not a contour
        inside = inside & ringed[:-2, 1:-1] & ringed[2:, 1:-1] & ringed[1:-1, :-2] & ringed[1:-1, 2:]
    return mask & ~inside
