"""One decoded picture as it is displayed: RGB, turned as the file says.

It has the stored pixels: a pixel aspect other than 1 is not applied, because masks count stored pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from flowmask.models.errors import DataError


@dataclass(frozen=True)
class Picture:
    """The form of a picture.

    stored, size: (height, width) in px, before and after turning
    turn:         a b c d of FFmpeg's display matrix, as -1, 0, 1: column p, row q go to ap + cq, bp + dq
    plain:        8 bit 4:2:0, progressive, not turned: then every FFmpeg gives the same RGB
    """

    stored: tuple[int, int]
    size: tuple[int, int]
    turn: tuple[int, int, int, int]
    plain: bool


UPRIGHT = (1, 0, 0, 1)


def picture_of(frame: av.VideoFrame, *, path: Path) -> Picture:
    """The form of a frame; DataError for a turn that is no multiple of 90 degrees."""
    stored, turn = (frame.height, frame.width), _turn(frame, path)
    size = stored if turn[0] else (frame.width, frame.height)
    plain = frame.format.name in ("yuv420p", "yuvj420p") and not frame.interlaced_frame and turn == UPRIGHT
    return Picture(stored, size, turn, plain)


def rgb_of(frame: av.VideoFrame, form: Picture, *, reformatter: VideoReformatter) -> NDArray[np.uint8]:
    """rgb8 [H W 3], of `form.size`."""
    pixels = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    a, b, c, d = form.turn
    if not a:
        pixels = pixels.swapaxes(0, 1)
    across, down = (a, d) if a else (c, b)
    return np.ascontiguousarray(pixels[::down, ::across], dtype=np.uint8)


def _turn(frame: av.VideoFrame, path: Path) -> tuple[int, int, int, int]:
    matrix: Any = frame.side_data.get(SideDataType.DISPLAYMATRIX)  # type: ignore[call-overload]
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    largest = max(map(abs, (a, b, c, d)))
    turn = tuple(round(value / largest) if largest else 0 for value in (a, b, c, d))
    straight = abs(turn[0] * turn[3]) + abs(turn[1] * turn[2]) == 1 and sum(map(abs, turn)) == 2
    if not straight:
        raise DataError(f"{path}: turned by {frame.rotation} degrees; only multiples of 90 are read: encode it again")
    return turn  # type: ignore[return-value]
