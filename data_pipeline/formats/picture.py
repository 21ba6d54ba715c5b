"""The only place that opens picture files of other programs: JPEG, PNG, BMP and WebP, known by their first bytes.

Raises DataError for a file that is missing, not regular, of another format or truncated, and for a header that states
more pixels than its bytes can hold. Pixels are rgb8: the upper 8 of 16 bits, without transparency; only the first
picture of an animation. The orientation in EXIF is applied only with `upright`.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from flowmask.data_pipeline.formats.names import natural_key
from flowmask.data_pipeline.formats.reading import open_file
from flowmask.models.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_PIXELS, _PIXELS_PER_BYTE = 1 << 25, 4  # 8K for any file; photographs have one byte for 2 to 4 px
# Exceptions that PIL raises for bytes that are no picture.
_DAMAGED: tuple[type[Exception], ...] = (OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError)
_DAMAGED += (EOFError, OverflowError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = 5  # and above


@contextmanager
def opened_image(
    path: Path,
    *,
    what: str = "frame",
    kind: str = "image",
    formats: tuple[str, ...] = _FORMATS,
    pixels: int | None = None,
) -> Iterator[Image.Image]:
    """An open picture; raises DataError if it must not be read. `what` and `kind` are words for the message.

    pixels: the expected number; a picture of that number is read from a file of any size
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
    try:
        with open_file(path) as file, Image.open(file, formats=formats) as image:
            _refuse_bomb(image, path, os.fstat(file.fileno()).st_size, expected=pixels)
            yield image
    except FileNotFoundError:
        raise DataError(f"{path}: the {what} is missing") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{path}: not a readable {kind}, or a truncated one; it must be {' or '.join(formats)}, but its first "
            "bytes are different"
        ) from None
    except _DAMAGED as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: not a readable {kind}, or a truncated one ({said})") from error


def read_image(path: Path, *, size: tuple[int, int] | None, upright: bool = False) -> NDArray[np.uint8]:
    """rgb8 [H W 3] of a picture; DataError if it cannot be read or is not of `size` (height, width)."""
    with opened_image(path, pixels=_pixels(size)) as image:
        turn = _UPRIGHT.get(_orientation(image)) if upright else None
        frame = _rgb8(image if turn is None else image.transpose(turn))
    if size is not None and frame.shape[:2] != size:
        raise DataError(
            f"{path}: {frame.shape[0]}x{frame.shape[1]} px (height x width), the video's first frame has "
            f"{size[0]}x{size[1]}"
        )
    return frame


def image_size(path: Path, *, upright: bool = False) -> tuple[int, int]:
    """(height, width) in px, from the header alone."""
    with opened_image(path) as image:
        turned = upright and _orientation(image) >= _ON_ITS_SIDE
        return (image.width, image.height) if turned else (image.height, image.width)


def read_index_map(path: Path, *, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [H W], the object of each pixel, 0 for none: the palette index, or the grey value of 8 bits."""
    with opened_image(path, what="mask", kind="mask", formats=("PNG",), pixels=_pixels(size)) as image:
        mode, indices = image.mode, np.asarray(image)
    if mode not in ("P", "L"):
        raise DataError(f"{path}: a mask of mode {mode}; expected palette indices (mode P), one an object")
    _refuse_other_size(indices.shape, path, size)
    return indices


def read_object_mask(path: Path, *, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Bool [H W]: true where a PNG's palette index, grey value or any colour channel is above 0.

    Raises DataError for another size, and for transparency, whose meaning is undefined.
    """
    with opened_image(path, what="mask", kind="mask", formats=("PNG",), pixels=_pixels(size)) as image:
        values = np.asarray(image)
        if image.mode.endswith("A"):
            if image.getchannel("A").getextrema() != (255, 255):
                raise DataError(f"{path}: a mask with transparency; save it as grey or with a palette, 0 for nothing")
            values = values[..., :-1]
    _refuse_other_size(values.shape, path, size)
    return np.asarray(values.any(axis=2) if values.ndim > 2 else values > 0)


def pictures_in(folder: Path, *, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The pictures of a folder in natural order of their names; without hidden files. Raises OSError."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.name[0] != ".")
    return sorted(found, key=lambda path: (natural_key(path.stem), path.name))


def _refuse_other_size(shape: Sequence[int], path: Path, size: tuple[int, int]) -> None:
    if tuple(shape[:2]) != size:
        raise DataError(f"{path}: the mask is {shape[0]}x{shape[1]} (height x width), its frame {size[0]}x{size[1]}")


def _pixels(size: tuple[int, int] | None) -> int | None:
    return None if size is None else size[0] * size[1]


def _refuse_bomb(image: Image.Image, path: Path, file_bytes: int, *, expected: int | None) -> None:
    pixels, most = image.width * image.height, max(_PIXELS + _PIXELS_PER_BYTE * file_bytes, expected or 0)
    if pixels > most or pixels == 0:
        raise DataError(
            f"{path}: {image.width}x{image.height} px in a file of {file_bytes} bytes; at most {most} px are "
            "accepted for this size: make the picture smaller"
        )


def _rgb8(image: Image.Image) -> NDArray[np.uint8]:
    image.info.pop("transparency", None)  # else PIL warns that it ignores it
    if not image.mode.startswith("I"):
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    grey = (np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1..8; 1 (as stored) if there is none or it is damaged."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except _DAMAGED:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1
