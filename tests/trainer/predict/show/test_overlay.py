"""The pictures for people: masks over frames, the legend, mask PNGs, overlay videos."""

import unicodedata
from pathlib import Path

import av
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont

from flowmask.data_pipeline.show.paint import STRIPE_PX
from flowmask.models.errors import DataError
from flowmask.trainer.predict.show import overlay
from flowmask.trainer.predict.show.overlay import (
    OverlayVideo,
    colour,
    font,
    legend,
    legend_text,
    paint,
    read_mask,
    view_size,
    wrap,
    write_mask,
)


@pytest.fixture(autouse=True)
def as_people_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "SHORT_SIDE_PX", 480)


def _disc(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 4) ** 2


def test_a_mask_png_is_8_bit_grey_of_0_and_255_and_reads_back_equal(tmp_path: Path) -> None:
    mask = _disc(31, 47)
    write_mask(tmp_path / "m.png", mask)
    with Image.open(tmp_path / "m.png") as image:
        assert (image.mode, image.size) == ("L", (47, 31))
        assert set(np.unique(np.asarray(image))) == {0, 255}
    assert (read_mask(tmp_path / "m.png") == mask).all()


def test_paint_changes_no_pixel_outside_the_masks_and_every_pixel_inside() -> None:
    frame = np.full((40, 60, 3), 128, np.uint8)
    mask = _disc(40, 60)
    painted = paint(frame, [(mask, colour(0))])
    assert ((painted != frame).any(-1) == mask).all()


def test_a_contour_is_drawn_in_the_solid_colour_but_not_along_the_border_of_the_frame() -> None:
    frame = np.zeros((40, 60, 3), np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[:, :30] = True
    painted = paint(frame, [(mask, (200, 100, 50))])
    assert (painted[:, 29] == (200, 100, 50)).all()
    assert (painted[1:, 0] != (200, 100, 50)).any(-1).all()


def test_where_masks_coincide_each_colour_is_seen_and_elsewhere_nothing_changes() -> None:
    """Every pixel looks as one of its masks alone would make it, and no run of pixels hides another mask."""
    rng = np.random.default_rng(0)
    height, width = 96, 160
    frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for count in (2, 3, 5):
        masks = [_disc(height, width) for _ in range(count)]
        masks[-1] = np.roll(masks[-1], 9, axis=1)
        layers = [(mask, colour(number)) for number, mask in enumerate(masks)]
        both = paint(frame, layers)
        alone = np.stack([paint(frame, [layer]) for layer in layers])
        held = np.stack(masks)
        as_one = (both == alone).all(-1) & held
        assert (as_one.any(0) == held.any(0)).all()
        once = held.sum(0) == 1
        assert (both[~held.any(0)] == frame[~held.any(0)]).all()
        assert all((both[once & mask] == one[once & mask]).all() for mask, one in zip(masks, alone))
        inner = np.logical_and.reduce(masks) & np.roll(np.logical_and.reduce(masks), 20, axis=1)
        for row in np.flatnonzero(inner.sum(1) > 3 * count * STRIPE_PX):
            assert as_one[:, row, inner[row]].any(-1).all(), "in a row that is as long as all stripes"
    same = [(_disc(height, width), colour(number)) for number in range(2)]
    solid = [(paint(frame, same) == np.array(tone, np.uint8)).all(-1).sum() for _, tone in same]
    assert min(solid) > 20, "the contour too"


@pytest.mark.parametrize(
    ("size", "seen"),
    [((64, 64), (480, 480)), ((480, 720), (480, 720)), ((2160, 3840), (1080, 1920)), ((60, 333), (346, 1920))],
)
def test_small_videos_are_shown_larger_and_large_ones_smaller_in_their_own_shape(
    size: tuple[int, int], seen: tuple[int, int]
) -> None:
    assert view_size(*size) == seen


def test_colours_of_prompts_are_all_different() -> None:
    assert len({colour(number) for number in range(60)}) == 60


def test_wrapped_lines_fit_and_say_every_word_or_end_in_an_ellipsis() -> None:
    text = "the two squares, one of which leaves the picture while the other one turns"
    lines = wrap(text, width_px=200, size_px=16, lines=9)
    assert " ".join(lines) == text
    assert all(font(16).getlength(line) <= 200 for line in lines)
    short = wrap(text, width_px=200, size_px=16, lines=2)
    assert len(short) == 2 and short[1].endswith("…") and font(16).getlength(short[1]) <= 200


def test_a_word_longer_than_the_line_is_broken_rather_than_lost() -> None:
    assert "".join(wrap("w" * 90, width_px=100, size_px=16, lines=99)) == "w" * 90


def test_the_legend_shows_each_prompt_in_its_colour_and_grows_with_their_number() -> None:
    prompts = [(f"prompt {i}", colour(i)) for i in range(3)]
    strip = legend(prompts, width=480)
    assert strip.shape[1] == 480
    assert strip.shape[0] > legend(prompts[:1], width=480).shape[0]
    for _, tone in prompts:
        assert (strip == np.array(tone, np.uint8)).all(-1).sum() > 50


@pytest.mark.parametrize("face", ["DejaVuSans.ttf", None])
def test_a_sentence_is_shown_only_if_the_font_has_a_glyph_for_each_of_its_letters(
    face: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The font's own table gives its letters; the legend uses only PIL."""
    fonts = [ImageFont.truetype(face, 16) if face else ImageFont.load_default(16)]
    monkeypatch.setattr(overlay, "font", lambda size: fonts[0])
    overlay._is_drawn.cache_clear()
    source = fonts[0].path
    if not isinstance(source, str):
        source.seek(0)
    has = TTFont(source, lazy=True).getBestCmap().keys()
    letters = [chr(number) for number in [*range(33, 0x3000, 7), *range(0x3040, 0x1F700, 397)]]
    letters = [letter for letter in letters if unicodedata.category(letter)[0] in "LNPS"]
    for letter in letters:
        assert (legend_text(f"a {letter}", instead="prompt 3") == f"a {letter}") == (ord(letter) in has), repr(letter)
    overlay._is_drawn.cache_clear()


@pytest.mark.parametrize("size", [(64, 64), (481, 721), (40, 300)])
def test_an_overlay_video_plays_with_even_sides_and_the_rate_and_frames_it_was_given(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    frame, mask, path = np.full((*size, 3), 90, np.uint8), _disc(*size), tmp_path / "o.mp4"
    with OverlayVideo(path, prompts=[("a disc", colour(0))], height=size[0], width=size[1], fps=30000 / 1001) as v:
        for _ in range(7):
            v.add(frame, [mask])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate is not None
        assert abs(float(stream.average_rate) - 30000 / 1001) < 1e-3
        frames = [f.to_ndarray(format="rgb24").astype(int) for f in container.decode(video=0)]
    assert len(frames) == 7
    high, wide = frames[0].shape[:2]
    assert high % 2 == wide % 2 == 0
    inside = frames[3][view_size(*size)[0] // 2, view_size(*size)[1] // 2]
    wanted = 0.55 * 90 + 0.45 * np.array(colour(0))
    assert abs(inside - wanted).max() < 12, "the colours survive the way to yuv420p and back"


def test_a_video_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "o.mp4"
    path.write_bytes(b"old")
    with (
        pytest.raises(RuntimeError),
        OverlayVideo(path, prompts=[("x", colour(0))], height=64, width=64, fps=5) as video,
    ):
        video.add(np.zeros((64, 64, 3), np.uint8), [np.zeros((64, 64), bool)])
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["o.mp4"]
    assert path.read_bytes() == b"old"


def test_a_video_in_a_missing_folder_is_one_line_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write the video .*nowhere/o\.mp4") as caught:
        OverlayVideo(tmp_path / "nowhere" / "o.mp4", prompts=[("x", colour(0))], height=64, width=64, fps=5)
    assert "\n" not in str(caught.value)
