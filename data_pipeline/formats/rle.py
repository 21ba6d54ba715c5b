"""COCO run-length masks, the form of true masks in records; and polygons to such masks.

A mask is {"size": [H, W], "counts": str}, runs counted down the columns. Another size, malformed counts, and counts
that do not cover the frame raise DataError with the caller's description of the place. (pycocotools' decoder returns
uninitialised memory for them, so this file decodes.) Every number is compared with the frame's pixels before use, so
no number overflows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.reading import shown
from flowmask.models.errors import DataError

Mask = NDArray[np.bool_]
_TRIANGLE = 6  # coordinates
_LONGEST_SIDE = 1 << 20  # px
_MARGIN = 64  # contours of a small picture may be longer than its pixels


def encode(mask: Mask) -> dict[str, Any]:
    """COCO RLE of a bool [H W] mask, ready for JSON."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode(rle: Mapping[str, Any] | None, *, size: tuple[int, int], where: str) -> Mask:
    """Bool [H W] of one RLE, which must be of `size` (H, W); None is an empty mask: the object is absent."""
    if rle is None:
        return np.zeros(size, dtype=bool)
    if not isinstance(rle, Mapping) or "counts" not in rle or not _is_size(rle.get("size")):
        raise DataError(f"{where}: expected a COCO RLE with `size` and `counts`, found {shown(rle)!r}")
    height, width = size
    if tuple(rle["size"]) != size:
        said = "x".join(str(side)[:20] for side in rle["size"])
        raise DataError(f"{where}: the RLE is {said} (height x width), but its frame is {height}x{width}")
    total = height * width
    runs = _runs(rle["counts"], total=total, where=where)
    if runs.min(initial=0) < 0 or runs.max(initial=0) > total or int(runs.sum()) != total:
        raise DataError(f"{where}: the RLE counts cover {sum(runs.tolist())} of {total} px; the mask is damaged")
    values = np.zeros(len(runs), dtype=bool)
    values[1::2] = True
    return np.repeat(values, runs).reshape(width, height).T


def is_empty(rle: Any) -> bool:
    """Whether a mask has no pixel, from its runs only; a malformed mask is not empty, because `decode` reports it."""
    if rle is None:
        return True
    if not isinstance(rle, Mapping) or "counts" not in rle or not _is_size(rle.get("size")):
        return False
    if not all(0 < side <= _LONGEST_SIDE for side in rle["size"]):
        return False
    total = int(rle["size"][0] * rle["size"][1])
    try:
        runs = _runs(rle["counts"], total=total, where="")
    except DataError:
        return False
    return not runs[1::2].any() and int(runs.sum()) == total


def decode_frames(frames: Sequence[Any], *, size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """Bool [F H W] of the RLEs of a clip's frames."""
    if not isinstance(frames, list | tuple) or not frames:
        raise DataError(f"{where}: expected the RLE of each frame, found {shown(frames)!r}")
    return np.stack([decode(frame, size=size, where=where) for frame in frames])


def rasterise(polygons: Any, *, size: tuple[int, int], where: str) -> Mask:
    """Bool [H W], the union of COCO polygons [x0, y0, x1, y1, ...] in px.

    Fewer than three points cover nothing (COCO has a few). DataError unless these are flat lists of finite numbers in
    pairs; also for points far outside of the picture and for very long contours, because pycocotools' memory grows with
    the length of an edge.
    """
    from pycocotools import mask as coco

    height, width = size
    if not isinstance(polygons, list) or not polygons:
        raise DataError(f"{where}: expected a list of polygons, found {shown(polygons)!r}")
    shapes = []
    for polygon in polygons:
        points = _points(polygon, where=where)
        if ((points < -max(size)) | (points > 2 * max(size))).any():
            raise DataError(
                f"{where}: the polygon reaches from {points.min():g} to {points.max():g} px, but its image "
                f"is {height}x{width} (height x width)"
            )
        corners = points.reshape(-1, 2)
        steps = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1, initial=0)
        if (length := float(steps.sum())) > height * width + _MARGIN * (height + width):
            raise DataError(
                f"{where}: a contour of {length:.0f} px, but its image is {height}x{width} (height x width)"
            )
        if len(points) >= _TRIANGLE:
            shapes.append(points.tolist())
    if not shapes:
        return np.zeros(size, dtype=bool)
    return np.asarray(coco.decode(coco.merge(coco.frPyObjects(shapes, height, width))), dtype=bool)


def _points(polygon: Any, *, where: str) -> NDArray[np.float64]:
    """Flat float64 coordinates of one polygon."""
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: not a polygon of numbers: {shown(polygon)!r}") from error
    if points.ndim != 1 or len(points) % 2 or not np.isfinite(points).all():
        raise DataError(f"{where}: not a list of finite x, y, x, y, ...: {shown(polygon)!r}")
    return points


def _is_size(said: Any) -> bool:
    """Whether this is a height and a width: two numbers."""
    return isinstance(said, list | tuple) and len(said) == 2 and all(type(side) in (int, float) for side in said)


def _runs(counts: Any, *, total: int, where: str) -> NDArray[np.int64]:
    """Run lengths of a COCO counts field for a frame of `total` px, each within -total..total.

    counts: a list, or the string of 5-bit groups, low group first
    """
    if isinstance(counts, list):
        if not all(type(count) is int and -total <= count <= total for count in counts):
            raise DataError(f"{where}: malformed RLE counts {shown(counts)!r} for {total} px")
        return np.asarray(counts, dtype=np.int64)
    try:
        code = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except (AttributeError, UnicodeEncodeError) as error:
        raise DataError(f"{where}: RLE counts are not an ASCII string: {shown(counts)!r}") from error
    if not code.size or (code < 0).any() or (code > 63).any() or code[-1] & 0x20:
        raise DataError(f"{where}: malformed RLE counts {shown(counts)!r}")
    ends = np.flatnonzero(~code & 0x20)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 12:
        raise DataError(f"{where}: malformed RLE counts {shown(counts)!r}")
    shifts = 5 * (np.arange(code.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((code & 0x1F) << shifts, starts)
    runs -= np.where(code[ends] & 0x10, 1 << 5 * lengths, 0)  # sign extension
    if max(-int(runs.min()), int(runs.max())) > total:
        raise DataError(f"{where}: malformed RLE counts {shown(counts)!r} for {total} px")
    # From the fourth count on, the difference to the count two places before is stored.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
