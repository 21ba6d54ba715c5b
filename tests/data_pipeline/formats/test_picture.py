"""Pictures are read as people see them, or refused in one line; no other file is opened, started or waited for."""

import io
import os
import random
import resource
import socket
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from trials import SEED, TRIALS

from flowmask.data_pipeline.formats import picture
from flowmask.data_pipeline.formats.picture import image_size, pictures_in, read_image, read_index_map, read_object_mask
from flowmask.models.errors import DataError

ROOT = Path(__file__).parents[3]
SIZE = (12, 16)
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, SIZE, np.uint8)
COLOUR = RNG.integers(0, 256, (*SIZE, 3), np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def png_of(raw: bytes, *, depth: int, kind: int, size: tuple[int, int] = SIZE, more: bytes = b"") -> bytes:
    """A PNG of raw sample rows, written by hand, since PIL writes no 16-bit colour."""
    rows = len(raw) // size[0]
    filtered = b"".join(b"\0" + raw[i * rows : (i + 1) * rows] for i in range(size[0]))
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(filtered, 9)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + chunks[0] + more + b"".join(chunks[1:])


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def palette_image() -> Image.Image:
    image = Image.fromarray(GREY // 64)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    return image


PALETTE = np.arange(10, 130, 10, dtype=np.uint8).reshape(4, 3)[GREY // 64]
DEEP = RNG.integers(0, 1 << 16, SIZE, np.uint16)
DEEP_COLOUR = RNG.integers(0, 1 << 16, (*SIZE, 3), np.uint16)
WITH_ALPHA = np.dstack([COLOUR, GREY])
CMYK = Image.fromarray(COLOUR[::-1]).convert("CMYK")
SHOWN = {
    "grey": (saved(Image.fromarray(GREY)), grey(GREY)),
    "one bit": (saved(Image.fromarray(GREY > 99)), grey(np.where(GREY > 99, 255, 0).astype(np.uint8))),
    "grey of 16 bits": (saved(Image.fromarray(DEEP)), grey((DEEP >> 8).astype(np.uint8))),
    "colour of 16 bits": (png_of(DEEP_COLOUR.astype(">u2").tobytes(), depth=16, kind=2), DEEP_COLOUR // 256),
    "palette": (saved(palette_image()), PALETTE),
    "palette with transparency": (saved(palette_image(), transparency=bytes([0, 99, 255, 7])), PALETTE),
    "colour": (saved(Image.fromarray(COLOUR)), COLOUR),
    "colour and alpha": (saved(Image.fromarray(WITH_ALPHA)), COLOUR),
    "grey and alpha": (saved(Image.fromarray(np.dstack([GREY, GREY[::-1]]))), grey(GREY)),
    "bmp": (saved(Image.fromarray(COLOUR), "BMP"), COLOUR),
    "webp": (saved(Image.fromarray(COLOUR), "WEBP", lossless=True), COLOUR),
    "animated": (
        saved(Image.fromarray(COLOUR), "WEBP", lossless=True, save_all=True, append_images=[CMYK.convert("RGB")]),
        COLOUR,
    ),
    "jpeg": ((said := saved(Image.fromarray(COLOUR), "JPEG")), np.asarray(Image.open(io.BytesIO(said)).convert("RGB"))),
    "jpeg of ink": ((said := saved(CMYK, "JPEG")), np.asarray(Image.open(io.BytesIO(said)).convert("RGB"))),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_each_kind_of_picture_is_read_as_what_it_shows_whatever_it_is_called(tmp_path: Path, name: str):
    content, expected = SHOWN[name]
    path = tmp_path / "00000.jpg"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_image(path, size=SIZE), expected)
        assert image_size(path) == SIZE


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_orientation_is_followed_where_it_is_asked_for_and_only_there(tmp_path: Path, form: str, orientation: int):
    """Each of the 8 orientations stores one scene. EXIF says where the stored row 0 and column 0 are seen."""
    scene = np.zeros((16, 32, 3), np.uint8)
    scene[:8, :16], scene[:8, 16:], scene[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    turned = scene.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else scene
    flip_rows, flip_columns = {2: (0, 1), 3: (1, 1), 4: (1, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}.get(
        orientation, (0, 0)
    )
    turned = turned[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    Image.fromarray(np.ascontiguousarray(turned)).save(path, form, exif=exif, **options)
    seen = read_image(path, size=None, upright=True).astype(int)
    assert seen.shape[:2] == image_size(path, upright=True) == (16, 32)
    assert np.abs(seen - scene).max() < 9
    stored = read_image(path, size=None).astype(int)
    assert stored.shape[:2] == image_size(path) == turned.shape[:2] and np.abs(stored - turned).max() < 9


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PPM", "ICO", "TGA", "EPS", "PDF", "DDS", "JPEG2000", "PCX"])
def test_a_format_that_is_not_named_is_refused_though_pillow_reads_it(tmp_path: Path, form: str, monkeypatch):
    monkeypatch.setattr(os, "posix_spawn", None)
    path = tmp_path / "00000.jpg"
    path.write_bytes(saved(Image.fromarray(COLOUR), form))
    with pytest.raises(DataError, match=r"must be JPEG or PNG or BMP or WEBP"):
        read_image(path, size=None)


def kinds_of_file(folder: Path):
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "to_pipe.jpg").symlink_to("pipe.jpg")
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(folder / "socket.jpg"))
    listening.close()


def test_what_is_no_regular_file_is_refused_at_once_and_a_link_to_one_is_followed(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds_of_file(tmp_path)
    began = time.monotonic()
    for path in tmp_path.iterdir():
        for read in (image_size, lambda path: read_image(path, size=SIZE)):
            with pytest.raises(DataError, match=r"no regular file|a folder|missing|symbolic links") as raised:
                read(path)
            assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    assert time.monotonic() - began < 2
    (tmp_path / "stored").write_bytes(SHOWN["colour"][0])
    (tmp_path / "link.png").symlink_to("stored")
    assert np.array_equal(read_image(tmp_path / "link.png", size=SIZE), COLOUR)


def bombs() -> dict[str, bytes]:
    side = 13000
    flat = png_of(b"\0" * (side * ((side + 7) // 8)), depth=1, kind=0, size=(side, side))
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * (1 << 27), zip=True)
    profile = zlib.compress(b"\0" * (1 << 27), 9)
    named = b"iCCP" + b"p\0\0" + profile
    chunk = struct.pack(">I", len(named) - 4) + named + struct.pack(">I", zlib.crc32(named))
    header = bytearray(saved(Image.fromarray(COLOUR), "BMP"))
    header[18:26] = struct.pack("<ii", 60000, 60000)
    frame = bytearray(saved(Image.fromarray(COLOUR), "JPEG"))
    sides = frame.index(b"\xff\xc0") + 5
    frame[sides : sides + 4] = struct.pack(">HH", 60000, 60000)
    return {
        "pixels": flat,
        "text": saved(Image.fromarray(COLOUR), pnginfo=text),
        "profile": png_of(COLOUR.tobytes(), depth=8, kind=2, more=chunk),
        "bmp": bytes(header),
        "jpeg": bytes(frame),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["pixels", "text", "profile", "bmp", "jpeg"])
def test_a_small_file_that_wants_much_memory_is_refused_or_read_without_it(tmp_path: Path, name: str):
    path = tmp_path / "bomb.png"
    path.write_bytes(bombs()[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    try:
        assert np.array_equal(read_image(path, size=None), COLOUR)
    except DataError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_as_many_pixels_as_the_other_frames_have_are_read_from_a_file_of_any_size(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(picture, "_PIXELS", 100)
    monkeypatch.setattr(picture, "_PIXELS_PER_BYTE", 0)
    path = tmp_path / "mask.png"
    path.write_bytes(saved(Image.fromarray(np.zeros(SIZE, np.uint8))))
    assert not read_object_mask(path, size=SIZE).any() and not read_index_map(path, size=SIZE).any()
    assert read_image(path, size=SIZE).shape == (*SIZE, 3)
    with pytest.raises(DataError, match=r"16x12 px in a file of \d+ bytes; at most 100 px"):
        read_image(path, size=None)


def mutants(count: int, seed: int, path: Path) -> tuple[int, int]:
    """Read damaged pictures; the numbers of read and of refused pictures."""
    draw, read = random.Random(seed), 0
    contents = [content for content, _ in SHOWN.values()]
    for _ in range(count):
        content = bytearray(draw.choice(contents))
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(min(len(content), draw.choice([40, 4000])))] = draw.randrange(256)
        path.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        began = time.process_time()
        try:
            high, wide = image_size(path, upright=True)
            frame = read_image(path, size=None, upright=True)
            assert frame.shape == (high, wide, 3) and frame.dtype == np.uint8
            read += 1
        except DataError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        assert time.process_time() - began < 2, bytes(content)
    return read, count - read


def test_a_damaged_picture_is_read_or_refused_in_one_line(tmp_path: Path):
    read, refused = mutants(300, SEED, tmp_path / "x.jpg")
    assert read and refused > 30


@pytest.mark.long
def test_a_damaged_picture_is_read_or_refused_at_length(tmp_path: Path):
    mutants(10000 * TRIALS, 1 + SEED, tmp_path / "x.jpg")


def test_a_mask_marks_its_object_by_any_value_above_0(tmp_path: Path):
    path, mask = tmp_path / "m.png", RNG.random(SIZE) > 0.5
    black = Image.fromarray(mask.astype(np.uint8))
    black.putpalette([0] * 6)  # both of its colours are black
    low = np.zeros((*SIZE, 3), np.uint8)
    low[mask, 2] = 1
    solid = np.dstack([low, np.full(SIZE, 255, np.uint8)])
    stored = {
        "one bit": Image.fromarray(mask),
        "grey 1": Image.fromarray(mask.astype(np.uint8)),
        "grey 255": Image.fromarray(mask.astype(np.uint8) * np.uint8(255)),
        "16 bits": Image.fromarray(mask.astype(np.uint16)),
        "palette": black,
        "colour": Image.fromarray(low),
        "opaque": Image.fromarray(solid),
        "grey, opaque": Image.fromarray(np.dstack([mask.astype(np.uint8), solid[..., 3]])),
    }
    for name, image in stored.items():
        image.save(path)
        assert np.array_equal(read_object_mask(path, size=SIZE), mask), name
    for content, said in [
        (saved(Image.fromarray(np.dstack([low, mask.astype(np.uint8) * np.uint8(255)]))), "transparency"),
        (saved(Image.fromarray(GREY), "JPEG"), "must be PNG"),
        (saved(Image.fromarray(GREY.T)), "the mask is 16x12"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_object_mask(path, size=SIZE)


def test_pictures_of_a_folder_come_by_number_and_hidden_files_are_none(tmp_path: Path):
    for name in ["10.png", "2.JPG", "1.jpeg", "._1.jpg", ".DS_Store", "readme.txt", "3.webp"]:
        (tmp_path / name).touch()
    assert [path.name for path in pictures_in(tmp_path)] == ["1.jpeg", "2.JPG", "3.webp", "10.png"]


def test_pictures_of_others_are_opened_in_one_place():
    callers = {
        str(path.relative_to(ROOT))
        for room in ("data_pipeline", "trainer", "launch", "models")
        for path in (ROOT / room).rglob("*.py")
        if "Image.open(" in path.read_text()
    }
    assert callers == {"data_pipeline/formats/picture.py", "trainer/predict/show/overlay.py"}, (
        "the latter reads our own masks"
    )
